"""The page says what the files say, for whatever files there are, and never anything a name smuggles in."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from merganser.errors import DataError, MissingExtra
from merganser.report import report
from merganser.report.words import nats, percent, seconds, share, signed

Make = Callable[..., Path]
VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """The page as tags, tables of cell texts and one running text."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.text, self.stack = "", list[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.stack.append(tag)
        if tag == "table":
            self.tables.append((found.get("class") or "", []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack[-1:] == [tag], f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] in ("style", "script"):
            return
        self.text += data
        if ("td" in self.stack or "th" in self.stack) and "small" not in self.stack:
            self.tables[-1][1][-1][-1] += data.strip("\n")

    def values(self, attribute: str) -> list[str]:
        return [found[attribute] or "" for _, found in self.tags if attribute in found]

    def of(self, kind: str) -> list[list[list[str]]]:
        return [rows for name, rows in self.tables if kind in name.split()]


def scores_of(folder: Path) -> Any:
    return json.loads((folder / "scores.json").read_text())


def change_scores(folder: Path, change: Callable[[Any], object]) -> None:
    scores = scores_of(folder)
    change(scores)
    (folder / "scores.json").write_text(json.dumps(scores))


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("tasks", [2, 6, 20])
def test_every_score_of_the_files_is_in_its_cell(make_run: Make, tasks: int) -> None:
    folder = make_run(tasks=tasks, drawn=False)
    scores, page = scores_of(folder), Page(report(folder))
    for tuned, table in zip((True, False), page.of("scores"), strict=True):
        header, base, experts, *lines = table
        assert header[3 : 3 + tasks] == [task["name"] for task in scores["tasks"]]
        for line, model in ((base, scores["base"]), (experts, scores["experts"])):
            expected = [percent(model["tasks"][task["name"]]["score"]) for task in scores["tasks"]]
            assert [line[1], *line[3 : 3 + tasks]] == [percent(model["mean"]["score"]), *expected]
        rows = {row["sentence"]: (index, row) for index, row in enumerate(scores["rows"]) if row["tuned"] == tuned}
        assert [plain(line[0]) for line in lines] == list(rows)
        for line in lines:
            index, row = rows[plain(line[0])]
            gain = next((g for g in scores["gains"] if g["with"] == index), None)
            assert line[1:] == [
                percent(row["mean"]["score"]), signed(gain["gain"]["score"]) if gain else "",
                *(percent(row["tasks"][task["name"]]["score"]) for task in scores["tasks"]),
                percent(row["normalised"]["score"]), percent(row["worst"]["score"]),
                nats(row["xi"]), percent(row["ece"]),
            ]  # fmt: skip


def test_experts_side_by_side_stand_under_the_experts(make_run: Make) -> None:
    folder = make_run(tasks=3, drawn=False)

    def ranked(at: float) -> dict[str, Any]:
        hits = {str(k): {"macro": at, "micro": at + 0.2} for k in (1, 3, 5, 10)}
        return {"hits": hits, "hits_published": hits}

    joint = {"base": ranked(0.31), "ensemble_own": ranked(0.32), "ensemble_all": ranked(0.33)}
    change_scores(folder, lambda s: s.update(joint={"classes": 9, "classes_published": 11, **joint}))
    assert len(Page(report(folder)).of("scores")[0][3:]) == len(scores_of(folder)["rows"]) // 2, "no merge was ranked"
    change_scores(folder, lambda s: [row.update(ranked(0.4)) for row in s["rows"]])
    path = report(folder)
    header, base, experts, own, every, *lines = Page(path).of("scores")[0]
    at = next(k for k, title in enumerate(header) if "joint" in title)
    assert [line[at] for line in (base, experts, own, every)] == ["31.0", "", "32.0", "33.0"]
    assert ["own heads" in own[0], "all heads" in every[0]] == [True, True]
    assert {line[at] for line in lines} == {"40.0"}
    assert "rows apart and over all inputs 60.0" in path.read_text()


def test_the_row_with_adapted_experts_stands_under_the_one_without(make_run: Make) -> None:
    folder = make_run(drawn=False)
    change_scores(folder, lambda s: (s["rows"].reverse(), s.update(gains=[], curves=[])))
    sentences = [plain(line[0]) for line in Page(report(folder)).of("scores")[0][3:]]
    assert all("ri(" not in first and "ri(" in second for first, second in zip(*[iter(sentences)] * 2, strict=True))
    for first, second in zip(*[iter(sentences)] * 2, strict=True):
        assert first.split(" | scale")[0] == second.removeprefix("ri(steps=200) | ").split(" | scale")[0]


def test_matrices_are_the_ones_of_the_diagnosis(make_run: Make) -> None:
    folder = make_run()
    said = json.loads((folder / "diagnosis.json").read_text())
    heat = Page(report(folder)).of("heat")
    expected = [item["matrix"] for item in said["drift"]] + [item["matrix"] for item in said["xi"]]
    assert len(heat) == len(expected)
    for table, matrix in zip(heat, expected, strict=True):
        assert table[0][1:] == said["tasks"]
        assert [line[1:] for line in table[1:]] == [[nats(value) for value in line] for line in matrix]


def test_before_and_after_share_one_colour_scale(make_run: Make) -> None:
    folder = make_run(tasks=3)
    drift = json.loads((folder / "diagnosis.json").read_text())["drift"]
    values = [value for item in drift for line in item["matrix"] for value in line]
    levels = [int(level) for level in re.findall(r'style="--p:(\d+)%"', report(folder).read_text())][: len(values)]
    by_value = [level for _, level in sorted(zip(values, levels, strict=True))]
    assert by_value == sorted(by_value)
    assert (by_value[0], by_value[-1]) == (0, 100)


def test_the_headline_states_gain_interval_and_share(make_run: Make) -> None:
    folder = make_run(drawn=False)
    scores = scores_of(folder)
    text = plain(Page(report(folder)).text)
    assert "Resolving interference helped 3 of 4 mergers; for 1 the difference could be chance." in text
    for gain in (gain for gain in scores["gains"] if gain["tuned"]):
        before, after = (scores["rows"][gain[side]]["mean"]["score"] for side in ("without", "with"))
        found = gain["gain"]
        numbers = (
            f"{percent(before)} → {percent(after)} ({signed(found['score'])}, "
            f"95 % interval {percent(found['low'])} to {percent(found['high'])})"
        )
        if found["low"] > 0:
            assert f"Recovered {share(gain['recovered'])} of what {gain['merge']} loses: {numbers}." in text
        else:
            assert f"Made no difference to {gain['merge']} that can be told from chance: {numbers}." in text


def test_a_loss_is_called_one(make_run: Make) -> None:
    folder = make_run(sign=-1.0, drawn=False)
    text = plain(Page(report(folder)).text)
    assert "Resolving interference made 3 of 4 mergers worse; for 1 the difference could be chance." in text
    assert "Made task_arithmetic worse: " in text
    assert "Recovered" not in text


def test_an_interval_that_prints_as_zero_is_no_gain(make_run: Make) -> None:
    folder = make_run(drawn=False)

    def barely(scores: Any) -> None:
        for gain in scores["gains"]:
            gain["gain"] = {"score": 0.01, "low": 0.0004, "high": 0.02}

    change_scores(folder, barely)
    text = plain(Page(report(folder)).text)
    assert "made no difference that can be told from chance, in all 4 mergers." in text


def test_one_merger_makes_one_sentence(make_run: Make) -> None:
    folder = make_run(drawn=False)
    change_scores(folder, lambda s: s.update(gains=[g for g in s["gains"] if g["merge"] == "task_arithmetic"]))
    assert "Resolving interference recovered 33 % of what task_arithmetic loses: " in plain(Page(report(folder)).text)


def test_a_run_without_adaptation_claims_nothing(make_run: Make) -> None:
    text = plain(Page(report(make_run(adapt=None))).text)
    assert "this page cannot say what resolving interference would bring" in text
    assert "Recovered" not in text
    assert "Adapting the experts" not in text


@pytest.mark.parametrize("missing", ["diagnosis.json", "recipe.toml", "run.json", "adapted"])
def test_any_optional_file_may_be_missing(make_run: Make, missing: str) -> None:
    folder = make_run(tasks=2)
    gone = folder / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    page = Page(report(folder))
    assert len(page.of("scores")) == 2
    assert not page.stack
    shown = {"diagnosis.json": "Drift:", "recipe.toml": "what to merge", "run.json": "Versions", "adapted": "held out"}
    for file, sign in shown.items():
        assert (sign in page.text) == (file != missing)


def test_scores_alone_make_a_page(make_run: Make) -> None:
    folder = make_run(extras=False)

    def least(scores: Any) -> None:
        scores.update(curves=[], gains=[])
        for row in scores["rows"]:
            for key in ("ece", "xi", "seconds", "val", "scale"):
                row[key] = None
            del row["normalised"], row["worst"]

    change_scores(folder, least)
    page = Page(report(folder))
    assert page.of("scores")[0][0][-1] == "textures"  # columns without numbers are not shown
    assert not re.search(r"\bnan\b|\bNone\b|Undefined", page.text)


def test_numbers_that_are_not_finite_are_said_or_left_out(make_run: Make) -> None:
    folder = make_run()
    diagnosis = json.loads((folder / "diagnosis.json").read_text())
    diagnosis["drift"][0]["matrix"][0][1] = float("inf")
    diagnosis["drift"][0]["matrix"][1][0] = None
    diagnosis["xi"][0]["per_task"][0] = float("nan")
    (folder / "diagnosis.json").write_text(json.dumps(diagnosis))
    first = Page(report(folder)).of("heat")[0]
    assert (first[1][2], first[2][1]) == ("∞", "–")


def test_names_cannot_smuggle_markup_in(make_run: Make) -> None:
    folder = make_run(tasks=2)
    evil = '"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;{{ 7*7 }}$x$'
    for path in (folder / "scores.json", folder / "diagnosis.json", folder / "run.json"):
        text = path.read_text()
        for word in ("digits", "task_arithmetic", "merganser demo", "ri(steps=200)", "0.1.0"):
            text = text.replace(word, json.dumps(f"{word}{evil}")[1:-1])
        path.write_text(text)
    (folder / "recipe.toml").write_text(f"# </code></pre>{evil}\n")
    page, clean = Page(report(folder)), Page(report(make_run("clean", tasks=2)))
    active = ("script", "img", "iframe", "object", "form")
    assert [t for t, _ in page.tags if t in active] == [t for t, _ in clean.tags if t in active] == ["script"]
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    assert any(evil in value for value in page.values("aria-label"))


def test_nothing_is_loaded_from_anywhere(make_run: Make) -> None:
    path = report(make_run())
    html, page = path.read_text(), Page(path)
    assert "://" not in html
    assert "@import" not in html
    for attribute in ("src", "srcset", "action", "poster", "data", "xlink:href"):
        assert not page.values(attribute)
    assert all(value.startswith(("#", "data:,")) for value in page.values("href"))
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "default-src 'none'" in next(v for v in page.values("content") if "default-src" in v)


def test_ids_are_unique_and_every_reference_finds_its_own(make_run: Make) -> None:
    path = report(make_run("a", tasks=2, title="one"), make_run("b", tasks=2, seed=1))
    html, page = path.read_text(), Page(path)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    wanted = re.findall(r"url\(#([^)]*)\)", html) + [v[1:] for v in page.values("href") if v.startswith("#")]
    assert set(wanted) <= set(ids)


def test_drawings_are_labelled_and_take_their_colours_from_the_page(make_run: Make) -> None:
    path = report(make_run())
    html, page = path.read_text(), Page(path)
    drawings = [found for tag, found in page.tags if tag == "svg"]
    assert len(drawings) == 1 + 4 + 4 + 6
    assert all(found.get("aria-label") or found.get("aria-hidden") for found in drawings)
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.S))
    assert not re.search(r"#[0-9a-f]{6}\b", svgs)
    assert "<image" not in svgs
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert used <= set(re.findall(r"(--[\w-]+):", html))


def test_headers_say_what_they_head(make_run: Make) -> None:
    page = Page(report(make_run("a", tasks=2), make_run("b", drawn=False)))
    assert all(found.get("scope") for tag, found in page.tags if tag == "th")
    assert sum(tag == "h1" for tag, _ in page.tags) == 1


def test_the_same_run_gives_the_same_bytes(make_run: Make, tmp_path: Path) -> None:
    folder = make_run(tasks=2)
    first = report(folder).read_bytes()
    second = subprocess.run(
        [sys.executable, "-c", "import sys; from merganser.report import report; report(sys.argv[1], to=sys.argv[2])",
         str(folder), str(tmp_path / "again.html")], env={"PYTHONHASHSEED": "7", "HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2], capture_output=True, check=False,
    )  # fmt: skip
    assert second.returncode == 0, second.stderr.decode()
    assert (tmp_path / "again.html").read_bytes() == first


@pytest.mark.parametrize(("tasks", "limit"), [(6, 250_000), (20, 600_000)])
def test_the_page_is_small(make_run: Make, tasks: int, limit: int) -> None:
    assert report(make_run(tasks=tasks)).stat().st_size < limit


def test_long_logs_are_thinned_and_a_torn_last_line_is_forgiven(make_run: Make) -> None:
    folder = make_run(tasks=2)
    log = folder / "adapted" / "ri-steps-200" / "digits" / "log.jsonl"
    lines = [json.dumps({"step": step, "own": 0.01, "others": 1 / (1 + step)}) for step in range(20_000)]
    log.write_text("\n".join(lines) + '\n{"step": 20000, "ow')
    assert report(folder).stat().st_size < 200_000


def test_several_runs_are_compared(make_run: Make) -> None:
    folders = [
        make_run("a", title="first", drawn=False), make_run("b", seed=1, title="second", drawn=False),
        make_run("c", adapt=None, drawn=False),
    ]  # fmt: skip
    path = report(*folders)
    assert path == folders[0] / "report.html"
    page = Page(path)
    table = page.of("compared")[0]
    assert table[0][1:] == ["1. first", "2. second", "3. merganser demo"]
    assert table[1][1:] == [percent(scores_of(folder)["base"]["mean"]["score"]) for folder in folders]
    line = next(line for line in table if plain(line[0]) == "ri(steps=200) | task_arithmetic")
    for cell, folder in zip(line[1:3], folders, strict=False):
        scores = scores_of(folder)
        gain = next(g for g in scores["gains"] if g["merge"] == "task_arithmetic" and g["tuned"])
        mean = scores["rows"][gain["with"]]["mean"]["score"]
        assert cell.split() == [percent(mean), signed(gain["gain"]["score"])]
    assert line[3] == "–"
    assert "do not hold the same tasks" not in page.text
    assert "do not hold the same tasks" in Page(report(folders[0], make_run("d", tasks=2, drawn=False))).text


def test_where_the_page_goes(make_run: Make, tmp_path: Path) -> None:
    folder = make_run(tasks=2, drawn=False)
    assert report(folder) == folder / "report.html"
    assert report(str(folder), to=tmp_path / "new" / "page.html") == tmp_path / "new" / "page.html"
    assert report(folder, to=tmp_path) == tmp_path / "report.html"
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "scores.json").unlink(), "holds no scores.json"),
        (lambda f: (f / "scores.json").write_text("{"), r"scores\.json: not JSON"),
        (lambda f: (f / "scores.json").write_text("[]"), r"scores\.json: "),
        (lambda f: change_scores(f, lambda s: s.update(version=2)), "has version 2, this merganser reads version 1"),
        (lambda f: change_scores(f, lambda s: s.pop("base")), r"scores\.json: base: Field required"),
        (lambda f: change_scores(f, lambda s: s["rows"][1].pop("mean")), r"rows\.1\.mean: Field required"),
        (lambda f: change_scores(f, lambda s: s["gains"][0].update({"with": 99})), "a row that does not exist"),
        (lambda f: (f / "diagnosis.json").write_text('{"version": 1, "tasks": ["a"], "drift": [{"label": "x", '
                                                     '"matrix": [[1, 2]]}]}'), r"drift\.0\.matrix is not 1 x 1"),
        (lambda f: (f / "run.json").write_bytes(b"\xff"), r"run\.json: cannot be read"),
    ],
)  # fmt: skip
def test_a_broken_folder_is_named_in_one_line(make_run: Make, break_it: Callable[[Path], object], says: str) -> None:
    folder = make_run(tasks=2)
    break_it(folder)
    with pytest.raises(DataError, match=says) as caught:
        report(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not (folder / "report.html").exists()


def test_no_folder_at_all() -> None:
    with pytest.raises(DataError, match="at least one folder"):
        report()


def test_matplotlib_is_asked_for_by_name(make_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'merganser\[report\]'"):
        report(make_run(tasks=2))


def test_it_needs_no_torch_and_leaves_matplotlib_as_it_was(make_run: Make) -> None:
    code = (
        "import sys, matplotlib; matplotlib.rcParams['font.size'] = 3; from merganser.report import report\n"
        "report(sys.argv[1]); assert matplotlib.rcParams['font.size'] == 3\n"
        "print([m for m in ('torch', 'safetensors', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(make_run(tasks=2))], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "[]", done.stderr


def test_the_recipe_is_there_to_be_copied(make_run: Make) -> None:
    folder = make_run(tasks=2)
    page = Page(report(folder))
    recipe = (folder / "recipe.toml").read_text().rstrip()
    assert tomllib.loads(recipe)
    assert recipe in page.text
    assert scores_of(folder)["command"] in page.text
    ran = json.loads((folder / "run.json").read_text())
    assert all(digest[:12] in page.text for digest in ran["inputs"].values())
    assert all(seconds(stage["seconds"]) in page.text for stage in ran["stages"])


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("on", "under", "least"),
    [(text, ground, 4.5) for text in ("ink", "muted", "with", "bad") for ground in ("page", "surface")]
    + [("with", "with-soft", 4.5), ("ink", "heat", 4.5), ("page", "ink", 4.5)]
    + [(mark, "page", 3.0) for mark in ("with", "without", "own", "others")],
)
def test_contrast_reaches_wcag_aa(theme: int, on: str, under: str, least: float) -> None:
    css = (files("merganser.report") / "templates" / "page.css").read_text()
    colours = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", css)}
    light, dark = sorted((luminance(colours[on][theme]), luminance(colours[under][theme])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= least
