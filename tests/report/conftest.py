"""Run folders made up for the page: the shape of real ones, numbers from a seeded generator."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAMES = (
    "digits", "letters", "garments", "flowers", "street signs", "textures", "satellites", "pets", "cars", "scenes",
    "faces", "tumours", "digits in the wild", "sketches", "food", "birds", "aircraft", "fungi", "numerals", "reviews",
)  # fmt: skip
MERGERS = {  # sentence: how far from base (0) to experts (1) it gets, and what share of the rest adapting recovers
    "average": (0.24, -0.02),
    "task_arithmetic": (0.34, 0.31),
    "ties(density=0.2)": (0.38, 0.36),
    "knots | ties(density=0.2)": (0.48, 0.27),
}
ADAPT = "ri(steps=200)"


def score(value: float, half: float) -> dict[str, float]:
    value = min(max(value, 0.0), 1.0)
    return {"score": value, "low": max(value - half, 0.0), "high": min(value + half, 1.0)}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def made_scores(tasks: int, adapt: str | None, sign: float, rng: random.Random, title: str) -> dict[str, Any]:
    names = list(NAMES[:tasks])
    base = {name: rng.uniform(0.2, 0.65) for name in names}
    best = {name: rng.uniform(0.84, 0.985) for name in names}
    half = {name: rng.uniform(0.008, 0.026) for name in names}
    rows: list[dict[str, Any]] = []
    gains: list[dict[str, Any]] = []
    curves: list[dict[str, Any]] = []
    for merge, (reach, back) in MERGERS.items():
        luck = {name: rng.uniform(-0.13, 0.13) for name in names}
        for tuned in (True, False):
            pair = []
            for word in (None, adapt) if adapt else (None,):
                way = reach * (1.0 if tuned else 0.86)
                way += sign * back * (1 - way) * (1.0 if tuned else 1.15) if word else 0.0
                by = (0.3 if word is None else 0.55) if tuned else 0.4
                tail = f"{merge} | scale(by={by})"
                found = {}
                for name in names:
                    at = base[name] + (best[name] - base[name]) * min(max(way + luck[name], -0.05), 0.99)
                    found[name] = score(at, half[name]) | {"normalised": min(at, 1.0) / best[name]}
                average = mean([entry["score"] for entry in found.values()])
                worst = min(names, key=lambda name: found[name]["score"])
                normalised = mean([entry["normalised"] for entry in found.values()])
                pair.append(len(rows))
                rows.append({
                    "sentence": f"{word} | {tail}" if word else tail, "adapt": word, "merge": merge, "scale": by,
                    "tuned": tuned, "val": average + rng.uniform(-0.01, 0.01), "tasks": found,
                    "mean": score(average, 0.007), "normalised": score(normalised, 0.008),
                    "worst": {"task": worst, "score": found[worst]["score"]}, "ece": rng.uniform(0.03, 0.14),
                    "xi": tasks * (1 - way) * 0.6, "seconds": rng.uniform(0.4, 3.0),
                })  # fmt: skip
            if len(pair) == 2:
                low, high = (rows[index]["mean"]["score"] for index in pair)
                gains.append({
                    "merge": merge, "tuned": tuned, "without": pair[0], "with": pair[1],
                    "gain": {"score": high - low, "low": high - low - 0.009, "high": high - low + 0.0095},
                    "recovered": (high - low) / (mean(list(best.values())) - low),
                })  # fmt: skip
        floor = mean(list(base.values()))
        for word in (None, adapt) if adapt else (None,):
            row = next(row for row in rows if row["merge"] == merge and row["adapt"] == word and row["tuned"])
            peak, at, wide = row["mean"]["score"], row["scale"], 0.35 if word is None else 0.8
            points = []
            for step in range(1, 13):
                scale = round(0.1 * step, 1) if row["scale"] != 0.55 else round(0.1 * step - 0.05, 2)
                height = floor - 0.06 + (peak - floor + 0.06) * max(0.0, 1 - ((scale - at) / wide) ** 2 * 0.55)
                points.append({"scale": scale, "val": height + rng.uniform(-0.006, 0.006), "test": height})
            curves.append({"merge": merge, "adapt": word, "points": points})
    return {
        "version": 1, "title": title, "date": "2026-11-22", "seed": 0, "command": "merganser run recipe.toml --to out",
        "tasks": [
            {"name": name, "classes": 10 + 3 * index, "val": 500, "test": 1000, "metric": "accuracy", "kind": "image"}
            for index, name in enumerate(names)
        ],
        "base": {"tasks": {n: score(base[n], half[n]) for n in names}, "mean": score(mean(list(base.values())), 0.006)},
        "experts": {
            "tasks": {n: score(best[n], half[n] / 2) for n in names}, "mean": score(mean(list(best.values())), 0.003),
        },
        "rows": rows, "gains": gains, "curves": curves,
    }  # fmt: skip


def made_diagnosis(scores: dict[str, Any], adapt: str | None, rng: random.Random) -> dict[str, Any]:
    names = [task["name"] for task in scores["tasks"]]
    loud = [rng.uniform(0.3, 1.6) for _ in names]
    before = [
        [0.0 if i == j else loud[i] * rng.uniform(0.2, 1.4) for j in range(len(names))] for i in range(len(names))
    ]
    after = [
        [rng.uniform(0.004, 0.02) if i == j else value * rng.uniform(0.02, 0.12) for j, value in enumerate(line)]
        for i, line in enumerate(before)
    ]
    xi = []
    for row in scores["rows"]:
        if row["tuned"]:
            matrix = [
                [row["xi"] / len(names) * rng.uniform(0.4, 1.6) * (1.0 if i == j else 0.5) for j in range(len(names))]
                for i in range(len(names))
            ]
            diagonal = [matrix[i][i] for i in range(len(names))]
            xi.append({
                "sentence": row["sentence"], "adapt": row["adapt"], "merge": row["merge"], "matrix": matrix,
                "per_task": diagonal, "sum": sum(diagonal),
            })  # fmt: skip
    drift = [{"label": "before", "matrix": before}]
    if adapt:
        drift.append({"label": f"after {adapt}", "matrix": after})
    return {"version": 1, "tasks": names, "distance": "kl", "drift": drift, "xi": xi}


def made_log(rng: random.Random, steps: int = 200) -> str:
    start, floor, lines = rng.uniform(0.4, 1.5), rng.uniform(0.02, 0.08), []
    for step in range(0, steps + 1, 4):
        part = step / steps
        others = floor + (start - floor) * 2.718 ** (-6 * part) * rng.uniform(0.93, 1.07)
        own = 0.0 if step == 0 else 0.02 * (1 - 2.718 ** (-9 * part)) * rng.uniform(0.85, 1.15)
        line = {"step": step, "steps": steps, "loss": own + others, "own": own, "others": others}
        lines.append(json.dumps(line))
        if step % 40 == 0:
            held = {"held_out": 1.2 * (own + others), "held_own": own * 1.15, "held_others": others * 1.25}
            lines.append(json.dumps({"step": step, **held}))
    return "\n".join(lines) + "\n"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of run folders."""

    def make(
        name: str = "out", *, tasks: int = 6, adapt: str | None = ADAPT, sign: float = 1.0, seed: int = 0,
        title: str = "merganser demo", extras: bool = True, drawn: bool = True,
    ) -> Path:  # fmt: skip
        rng = random.Random(seed)
        folder = tmp_path / name
        folder.mkdir(parents=True)
        scores = made_scores(tasks, adapt, sign, rng, title)
        if not drawn:  # drawing takes nearly all the time, and most of what a test asks is not in the drawings
            scores["curves"] = []
        (folder / "scores.json").write_text(json.dumps(scores))
        if not (extras and drawn):
            return folder
        (folder / "diagnosis.json").write_text(json.dumps(made_diagnosis(scores, adapt, rng)))
        names = [task["name"] for task in scores["tasks"]]
        for expert in names if adapt else ():
            log = folder / "adapted" / "ri-steps-200" / expert / "log.jsonl"
            log.parent.mkdir(parents=True)
            log.write_text(made_log(rng))
        sentence = scores["rows"][-1]["sentence"]
        (folder / "recipe.toml").write_text(
            f'# what to merge, and how\nbase = "checkpoints/base"\nsentences = [\n  "{sentence}",\n]\nseed = 0\n\n'
            + "".join(f'[experts."{expert}"]\nweights = "checkpoints/{expert}"\n' for expert in names[:3])
        )
        stages = [{"name": f"adapt {n}", "seconds": rng.uniform(8, 12), "reused": n == "letters"} for n in names]
        stages = (stages if adapt else []) + [
            {"name": "merge", "seconds": 4.2, "reused": False}, {"name": "evaluate", "seconds": 31.0, "reused": False},
            {"name": "diagnose", "seconds": 12.5, "reused": False},
        ]  # fmt: skip
        run = {
            "version": 1, "stages": stages, "seconds": sum(float(stage["seconds"]) for stage in stages),
            "versions": {"merganser": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
            "inputs": {n: f"{rng.getrandbits(256):064x}" for n in ["base", *names]},
        }  # fmt: skip
        (folder / "run.json").write_text(json.dumps(run))
        return folder

    return make
