"""Studies: every variation against the same mergers without adapting, over seeds, from runs that are not done twice."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_text_suite import needs_data, needs_minilm, piece
from test_vision_suite import needs_data as needs_pictures
from test_vision_suite import piece as pictures

from merganser.errors import DataError, SentenceError
from merganser.evaluate.run import Outcome, Scores
from merganser.evaluate.table import Row, rows_in
from merganser.recipe import InputsPart, ModelPart, Recipe
from merganser.sentence import parse
from merganser.suites import glyphs, studies, text, vision
from merganser.suites.measured import baselines, proxy, transfer
from merganser.suites.pretrain import pretrain
from merganser.suites.studies import STUDIES, Group, Study, Words, _Found, words_of
from merganser.suites.suite import shortened
from merganser.train import Plan


def undated(path: Path) -> dict:
    """Return what a study tells, without the day, which may change between two runs of it."""
    told = json.loads(path.read_text())
    assert told.pop("date")
    return told


def recipe(encoder: str = "text") -> Recipe:
    names = "abcdefgh"
    files = [Path("wiki.txt.gz"), Path("brown.txt.gz")]
    return Recipe(
        sentences=["ties"], model=ModelPart(base="base", encoder=encoder), experts={n: Path(n) for n in names},
        tasks={n: Path(n) for n in names}, inputs=InputsPart(files=files, limit=12_000),
    )  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("encoder", ["text", "merganser.models.toy:conv_net"])
def test_every_study_asks_what_can_be_run(name, encoder):
    asked = STUDIES[name]
    groups = asked.groups(recipe(encoder), Words({"lr": 0.001}))
    labels = [label for group in groups for label in group.adapts]
    assert len(labels) == len(set(labels)) >= 1
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        changed = group.change(recipe(encoder))
        assert set(changed.tasks) == set(changed.experts)
        for adapt in group.adapts.values():
            for merger in asked.mergers:
                for step in parse(f"{studies._asked_with(adapt, merger)} | {merger}").adapt:
                    step.hook("check")(**step.knobs)


def test_ri_is_written_as_the_suite_does():
    assert words_of(text.SUITE)() == "ri"
    conv = words_of(vision.CONV)
    assert conv() == "ri(steps=300, lr=0.0005, batch=64)"
    assert conv(steps=50) == "ri(steps=50, lr=0.0005, batch=64)"
    assert words_of(vision.CONV, "ri(steps=100, alpha=3)")() == "ri(steps=100, lr=0.0005, batch=64, alpha=3)"
    asked = STUDIES["alpha"].groups(recipe(), Words())[0].adapts
    assert list(asked.values())[:2] == ["ri(alpha=0.3)", "ri"], "what is usual is not done twice"
    rates = STUDIES["lr"].groups(recipe(), conv)[0].adapts
    assert list(rates) == ["0.0002", "0.0005", "0.001", "0.005"]


def rows(wrong: int, adapt: str | None = None) -> Row:
    labels = np.zeros(100, np.int64)
    said = labels.copy()
    said[:wrong] = 1
    one = Outcome(labels, said, np.ones(100), "accuracy")
    return Row("s", Scores({"a": one}), "ties", adapt, 1.0)


def test_gains_are_means_over_seeds_with_a_paired_interval():
    found = _Found([(rows(30), rows(20, "ri")), (rows(30), rows(10, "ri"))])
    told = found.told([0.9, 0.9])
    assert told["by_seed"] == pytest.approx([0.1, 0.2])
    assert told["gain"]["score"] == pytest.approx(0.15)
    assert told["recovered"] == pytest.approx(0.15 / 0.2)
    assert 0 < told["gain"]["low"] < 0.15 < told["gain"]["high"]
    assert told["gain"]["p"] < 0.05
    assert _Found([(rows(10), rows(10, "ri"))]).told([0.8])["recovered"] is None, "nothing was lost"


def test_unknown_studies_and_adapting_mergers_are_told(tmp_path):
    with pytest.raises(DataError, match="did you mean 'steps'"):
        studies.open_study("step")
    with pytest.raises(DataError, match="has no studies"):
        studies.suite_of("domains", text)
    with pytest.raises(DataError, match="a study adapts by itself"):
        studies.bench(text.SUITE, tmp_path, tmp_path / "out", "steps", how=["ri | ties"])
    with pytest.raises(DataError, match="give ri with the knobs to change"):
        studies.bench(text.SUITE, tmp_path, tmp_path / "out", "steps", ri="coadapt")
    with pytest.raises(SentenceError, match="steps"):
        words_of(text.SUITE, "ri(steps=-1)")
    with pytest.raises(DataError, match="study 'proxy' is measured as a whole"):
        studies.bench(text.SUITE, tmp_path, tmp_path / "out", "proxy", only=["tokens"])
    groups = [Group("all", {"50": "ri(steps=50)", "300": "ri"}), Group("few", {"few": "ri"})]
    with pytest.raises(DataError, match=r"'30': no such variation \(did you mean '300'\?\); known: 50, 300, few"):
        studies.chosen_of(groups, ["50", "30"])
    assert [g.adapts for g in studies.chosen_of(groups, ["300"])] == [{"300": "ri"}]
    assert studies.chosen_of(groups, ()) == groups


@needs_data
@needs_minilm
def test_a_small_study_runs_and_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    adapts = {"short": "ri(steps=2, batch=8)", "longer": "ri(steps=3, batch=8)"}
    groups = [Group("few", adapts, studies.with_inputs(limit=40))]
    monkeypatch.setitem(
        STUDIES, "trial", Study("How many?", "inputs", lambda _recipe, _ri: groups, ("task_arithmetic",))
    )
    short = shortened(text.SUITE, steps=4, scales=[1.0])
    data, out = piece(tmp_path / "data"), tmp_path / "out"
    how = ["average", "task_arithmetic | scale(by=0.3)"]
    told = undated(studies.bench(short, data, out, "trial", seeds=2, how=how))
    assert [one["label"] for one in told["variations"]] == ["short", "longer"]
    assert told["mergers"] == ["average", "task_arithmetic"]
    for one in told["variations"]:
        assert one["seconds"] > 0
        for merger in told["mergers"]:
            cell = one["mergers"][merger]
            assert len(cell["by_seed"]) == len(cell["scales"]) == 2
            assert cell["gain"]["score"] == pytest.approx(cell["with"] - cell["without"])
            scale = {"average": 1, "task_arithmetic": 0.3}[merger]
            assert cell["written"]["scales"] == [[scale, scale]] * 2
            assert cell["written"]["gain"]["score"] == pytest.approx(
                cell["written"]["with"] - cell["written"]["without"]
            )
            if merger == "average":  # which has no scale to choose
                assert cell["written"] == {k: v for k, v in cell.items() if k not in ("written", "over")}
            else:
                assert cell["written"]["without"] != cell["without"]
            assert ("over" in cell) == (one["label"] == "longer")
    short_, longer = (one["mergers"]["task_arithmetic"] for one in told["variations"])
    assert longer["over"]["gain"]["score"] == pytest.approx(longer["with"] - short_["with"])
    assert longer["over"]["by_seed"] == pytest.approx(np.subtract(longer["by_seed"], short_["by_seed"]))
    for seed, reused in ((0, False), (1, True)):  # what no seed can change is scored once
        stages = json.loads((out / f"seed-{seed}" / "few" / "run.json").read_text())["stages"]
        assert {s["reused"] for s in stages if s["name"] in ("score average", "score base and experts")} == {reused}
        assert not any(s["reused"] for s in stages if s["name"].startswith("score ri"))
    by_hand = [
        r for r in rows_in(out / "seed-1" / "few") if r.adapt == "ri(steps=3, batch=8)" and r.merging == "average"
    ]
    alone = [r for r in rows_in(out / "seed-1" / "few") if r.adapt is None and r.merging == "average"]
    cell = told["variations"][1]["mergers"]["average"]
    assert cell["by_seed"][1] == pytest.approx(by_hand[0].scores.mean - alone[0].scores.mean)
    assert "<svg" in (out / "study.svg").read_text()
    written = {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")}
    assert undated(studies.bench(short, data, out, "trial", seeds=2, how=how)) == told
    one = json.loads(studies.bench(short, data, out, "trial", seeds=1, how=how, only=["longer"]).read_text())
    assert [v["label"] for v in one["variations"]] == ["longer"]
    assert "--only 'longer'" in one["command"]
    with pytest.raises(DataError, match="'long': no such variation"):
        studies.bench(short, data, tmp_path / "none", "trial", only=["long"])
    assert not (tmp_path / "none").exists()
    assert {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")} == written


@needs_pictures
@pytest.mark.parametrize("name", studies.MEASURED)
def test_a_small_study_of_its_own_runs_and_is_read_back(tmp_path, monkeypatch, name):
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(baselines, "STEPS", 2)
    monkeypatch.setattr(proxy, "LIMIT", 20)
    few = {"images": 20, "batch": 4, "plan": Plan(2, 1e-3)}
    short = shortened(
        vision.CONV, steps=4, scales=[0.5, 1.0], base=lambda: pretrain(tmp_path / "base", "ab", glyphs.SANS, **few)
    )
    data, out = pictures(tmp_path / "data"), tmp_path / "out"
    asked = {"seeds": 1 if name == "proxy" else 2, "ri": "ri(steps=2, batch=4)"}
    asked["how"] = ["task_arithmetic"] if name == "proxy" else None
    told = undated(studies.bench(short, data, out, name, **asked))
    assert all(len(row) == len(told["head"]) for row in told["rows"])
    assert all(one["low"] <= one["y"] <= one["high"] for one in told["points"])
    assert "<svg" in (out / "study.svg").read_text()
    written = {p: p.stat().st_mtime_ns for p in out.rglob("rows/*.json")}
    assert written
    assert undated(studies.bench(short, data, out, name, **asked)) == told
    assert {p: p.stat().st_mtime_ns for p in out.rglob("rows/*.json")} == written
    if name == "baselines":
        by_way = {row[0]: row for row in told["rows"]}
        assert by_way["distac(steps=2, lr=0.0005, batch=4) | task_arithmetic"][-1] == str(2 * 4 * 2)
        assert by_way["multi-task distillation"][-1] == by_way["tsv, then distil"][-1] == str(2 * 4 * 2)
    if name == "transfer":
        assert {one["label"] for one in told["points"]} == {"blood_cells on sign_digits", "sign_digits on blood_cells"}
        assert sum(int(row[1]) for row in told["rows"]) == 2
        studies.bench(short, data, out, name, **{**asked, "how": ["ties"]})
        assert len([*out.rglob("rows/*ties.json")]) == len([*out.rglob("rows/*task-arithmetic.json")]) == 4
    if name == "proxy":
        assert {"noise", "all files", "the tasks' own"} <= {one["source"] for one in told["found"]}
        assert set(told["rho"]) == set(proxy.SCORES)


def test_what_a_study_of_its_own_cannot_do_is_told(tmp_path):
    with pytest.raises(DataError, match="merges pairs by one merger"):
        transfer.measure(studies.Asked(recipe(), Words(), tmp_path, 1, ["ties", "tsv"], print))
