"""RECORDS.md and docs/results/ from results files: every number that is claimed comes from a file, by one command.

    python bench/records.py                      write them again
    python bench/records.py --check              exit with 1 if they are not what the results give
    python bench/records.py --add RUN --as NAME  take a run's scores.json in as docs/results/NAME.json

docs/results/records.toml lists the records: ``title``, ``kind`` ("suite": a run's scores.json, "speed": what
merge_speed.py writes, "peers": what peers/accuracy.py writes, "study": a study.json, "rows": a table in the file itself,
with a figure where the file has ``points``), ``file``, ``command``, ``about`` (before the tables), ``notes`` (after
them), for a suite ``by_task`` (true: with a table task by task), and for a study ``written`` (true: with a table of
scales as written) and ``over`` (true: with what variations give over the first).

README.md and the pages in docs show results between two comments, "results: FILE" and "end of results", which this
fills with the gains of a suite's tuned rows, or of a study.
"""

import argparse
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from merganser.report.figure import gains_figure, study_figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
HEAD = """# Records

Measured results, written by `python bench/records.py` from the files in docs/results. Intervals are 95 % bootstrap
intervals over test examples, gains are paired; seeds are not in them.
"""
Told = dict[str, Any]


def points(value: float) -> str:
    return f"{100 * value:.1f}"


def signed(value: float) -> str:
    return f"{100 * value:+.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def gain_of(told: Told | None) -> str:
    return "–" if told is None else f"{signed(told['score'])} [{signed(told['low'])}, {signed(told['high'])}]"


def pair_rows(scores: Told, tuned: bool) -> list[list[str]]:
    """Return a line for each merger that was run with and without adapting."""
    found = []
    words = {gain["adapt"] for gain in scores["gains"]}
    for gain in (g for g in scores["gains"] if g["tuned"] == tuned):
        without, with_ = scores["rows"][gain["without"]], scores["rows"][gain["with"]]
        xi = [row["xi"] for row in (without, with_)]
        recovered = gain["recovered"]
        found.append([
            f"`{gain['merge']}`" + (f" by `{gain['adapt']}`" if len(words) > 1 else ""),
            *(f"{points(row['mean']['score'])} (scale {row['scale']:g})" for row in (without, with_)),
            gain_of(gain["gain"]),
            "–" if recovered is None else f"{100 * recovered:.0f} %",
            "–" if None in xi else f"{xi[0]:.2f} -> {xi[1]:.2f}",
            *([" -> ".join(points(row["hits"]["1"]["macro"]) for row in (without, with_))] if joint(scores) else []),
        ])  # fmt: skip
    return found


def joint(scores: Told) -> bool:
    """Tell whether the rows have hits@1 in the union of all tasks' classes."""
    return all(row.get("hits") for row in scores["rows"])


def other_rows(scores: Told, tuned: bool) -> list[list[str]]:
    """Return a line for each row that stands alone."""
    paired = {at for gain in scores["gains"] for at in (gain["without"], gain["with"])}
    rows = [row for at, row in enumerate(scores["rows"]) if at not in paired and row["tuned"] == tuned]
    return [[f"`{row['sentence']}`", points(row["mean"]["score"])] for row in rows]


def suite(scores: Told) -> str:
    parts = [f"Base {points(scores['base']['mean']['score'])}, experts {points(scores['experts']['mean']['score'])}."]
    for tuned, name in ((True, "Scale chosen on validation:"), (False, "Scale as written:")):
        rows = pair_rows(scores, tuned)
        if rows:
            overall = scores.get("overall", {}).get("tuned" if tuned else "default")
            if overall:
                rows.append(["mean", "", "", gain_of(overall), "", "", *([""] if joint(scores) else [])])
            many = len({gain["adapt"] for gain in scores["gains"]}) > 1
            with_ = "adapted" if many else "with `ri`"
            head = ["merger", "without", with_, "gain, points [95 % interval]", "recovered", "xi without -> with"]
            head += ["joint hits@1"] if joint(scores) else []
            parts += [name, table(head, rows)]
        if alone := other_rows(scores, tuned):
            parts += ["" if rows else name, table(["sentence", "mean"], alone)]
    if there := scores.get("domains"):
        parts += ["In other domains:", domains(there)]
    return "\n\n".join(part for part in parts if part)


def by_task(scores: Told) -> str:
    """Return the tuned rows task by task, base and experts first, the experts side by side under all heads."""
    names = [task["name"] for task in scores["tasks"]]
    rows = []
    for who, hits in (("base", "base"), ("experts", "ensemble_own")):
        part = scores[who]
        told = [points(part["tasks"][n]["score"]) for n in names]
        rows.append([who, *told, points(part["mean"]["score"]), points(scores["joint"][hits]["hits"]["1"]["macro"])])
    for row in (row for row in scores["rows"] if row["tuned"]):
        told = [points(row["tasks"][n]["score"]) for n in names]
        rows.append([f"`{row['sentence']}`", *told, points(row["mean"]["score"]), points(row["hits"]["1"]["macro"])])
    return table(["model", *names, "mean", "joint"], rows)


def domains(there: Told) -> str:
    names = [task["name"] for task in there["tasks"]]
    chosen = [row for row in there["rows"] if row["tuned"]] or there["rows"]
    rows = [
        [f"`{row['sentence']}`", *(points(row["tasks"][n]["score"]) for n in names), points(row["mean"]["score"])]
        for row in chosen
    ]
    for name in ("experts", "base"):
        part = there[name]
        rows.insert(0, [name, *(points(part["tasks"][n]["score"]) for n in names), points(part["mean"]["score"])])
    return table(["model", *names, "mean"], rows)


def speed(told: Told) -> str:
    rows = []
    for row in told["rows"]:
        what = "wall" if row["threads"] == 0 else "cpu"
        ratio = row["ratio"].get(what) if row["peer"] else None
        span = f" ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio and row["repeats"] > 1 else ""
        claim = row["claims"].get(f"{what} to {row['peer']}", {}).get("at most")
        missed = [
            f"{k} {c['found']:.3g} of {c['at most']:.3g}" for k, c in row["claims"].items() if c["found"] > c["at most"]
        ]
        over, under = ("> ", "< ") if row.get("stopped") else ("", "")
        anon = [f"{row['anon'][who]['max']:.0f}" if who in row["anon"] else "–" for who in ("ours", "peer")]
        rows.append([
            row["case"], row["set"] or "–", row["peer"] or "–", what,
            f"{row[what]['ours']['median']:.2f}", over + f"{row[what]['peer']['median']:.1f}" if row["peer"] else "–",
            under + f"{ratio['median']:.3f}{span}" if ratio else "–", f"{claim:g}" if claim else "–", *anon,
            str(row["repeats"]), "; ".join(missed) or "–",
        ])  # fmt: skip
    head = [
        "case",
        "set",
        "peer",
        "seconds",
        "ours",
        "peer's",
        "ratio",
        "target",
        "MiB ours",
        "MiB peer",
        "rounds",
        "missed",
    ]
    return table(head, rows)


def peers(told: Told) -> str:
    """Return a line for each merge done by a peer and by us on the same experts."""
    lines = []
    for row in told["rows"]:
        head = [row["peer"], row["case"], f"`{row['sentence']}`"]
        if "failed" in row:
            lines.append([*head, "–", "–", "–", "–", "–", "–", f"failed: {row['failed']}"])
            continue
        largest, seeds, note = row["largest"], row.get("seeds", []), [row["note"]] if row["note"] else []
        if len(seeds) > 1:
            note.append(f"ours over {len(seeds)} seeds {points(min(seeds))} to {points(max(seeds))}")
        lines.append([
            *head, points(row["ours"]), points(row["theirs"]), f"{100 * row['difference']:+.2f}",
            f"{signed(largest['difference'])} ({largest['task']})" if largest["difference"] else "0",
            f"{100 * row['same predictions']:.1f} %", "–" if row["dice"] else f"{row['weights']['largest']:.1e}",
            "; ".join(note) or "–",
        ])  # fmt: skip
    head = [
        "peer", "its method", "our sentence", "ours", "its", "difference", "largest of a task", "same predictions",
        "weights differ", "why",
    ]  # fmt: skip
    ends = ", ".join(f"{name} {points(value)}" for name, value in told["ends"].items())
    versions = ", ".join(f"{name} {version}" for name, version in sorted(told["versions"].items()))
    return f"Mean over {len(told['tasks'])} tasks: {ends}. Versions: {versions}.\n\n{table(head, lines)}"


def study(told: Told) -> str:
    """Return a line for each variation, or each merger where there is but one: without, with adapting, the gain."""
    if "rows" in told:
        return rows(told)
    variations, mergers = told["variations"], told["mergers"]
    tops = list(dict.fromkeys(points(one["experts"]) for one in variations))
    about = f"Experts {', '.join(tops)}{' (line by line)' if len(tops) > 1 else ''}; seeds: {told['seeds']}. "
    about += "Without -> with adapting, gain, share of the loss recovered; scales chosen on validation."
    if len(variations) == 1:
        one = variations[0]
        lines = [[f"`{m}`", study_cell(one["mergers"][m])] for m in mergers]
        head = ["merger", f"`{one['adapt']}`"]
        return f"{about}\n\n{table(head, lines)}"
    lines = [
        [one["label"], *(study_cell(one["mergers"][m]) for m in mergers), f"{one['seconds']:.0f}"] for one in variations
    ]
    head = [told["axis"], *(f"`{merger}`" for merger in mergers), "seconds an expert"]
    return f"{about}\n\n{table(head, lines)}"


def scales_of(told: Told) -> str:
    """Return a line for each variation and merger of a study: what the scale as written is behind the best one."""
    lines = []
    for one in told["variations"]:
        for merger in told["mergers"]:
            best, written = one["mergers"][merger], one["mergers"][merger]["written"]
            gaps = [
                f"{points(written[w])}, {points(best[w])}, {signed(best[w] - written[w])}" for w in ("without", "with")
            ]
            lines.append([
                one["label"], f"`{merger}`", f"{written['scales'][0][0]:g}", *gaps, gain_of(written["gain"]),
            ])  # fmt: skip
    head = [told["axis"], "merger", "scale as written", "without: as written, chosen, gap", "with: the same"]
    head.append("gain as written [95 % interval]")
    alone = len(told["variations"]) == 1
    return table(head[alone:], [line[alone:] for line in lines])


def over_first(told: Told) -> str:
    """Return a line for each further variation of a study: what it gives over the first, paired."""
    first, *more = told["variations"]
    lines = [
        [one["label"], *(gain_of(one["mergers"][merger]["over"]["gain"]) for merger in told["mergers"])] for one in more
    ]
    return table([f"over {first['label']}", *(f"`{merger}`" for merger in told["mergers"])], lines)


def study_cell(cell: Told) -> str:
    share = "" if cell["recovered"] is None else f", {100 * cell['recovered']:.0f} %"
    return f"{points(cell['without'])} -> {points(cell['with'])}, {gain_of(cell['gain'])}{share}"


def rows(told: Told) -> str:
    return table(told["head"], [[str(cell) for cell in row] for row in told["rows"]])


KINDS: dict[str, Callable[[Told], str]] = {"suite": suite, "speed": speed, "rows": rows, "peers": peers, "study": study}


SHOWN = re.compile(r"(<!-- results: (\S+\.json) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def shown(text: str) -> str:
    """Return a page with its results put in."""

    def put(found: re.Match[str]) -> str:
        told = json.loads((RESULTS / found[2]).read_text(encoding="utf-8"))
        return f"{found[1]}{short_study(told) if 'study' in told else short(told)}\n{found[3]}"

    return SHOWN.sub(put, text)


def short(scores: Told) -> str:
    """Return what a suite found in one sentence and one small table."""
    head = ["merger", "without", "with `ri`", "gain [95 % interval]", "interference xi"]
    lines = [
        [name, without.split(" (")[0], f"**{with_.split(' (')[0]}**", gain, xi]
        for name, without, with_, gain, _, xi, *_ in pair_rows(scores, tuned=True)
    ]
    ends = f"base {points(scores['base']['mean']['score'])}, experts {points(scores['experts']['mean']['score'])}"
    return f"Mean score in percent ({ends}), scale chosen on validation:\n\n{table(head, lines)}"


def short_study(told: Told) -> str:
    """Return what a study found of every variation in one small table; gain and share are those of the last one."""
    variations = told["variations"]
    lines = []
    for merger in told["mergers"]:
        cells = [one["mergers"][merger] for one in variations]
        with_ = [points(cell["with"]) for cell in cells]
        share = cells[-1]["recovered"]
        lines.append([
            f"`{merger}`", points(cells[0]["without"]), *with_[:-1], f"**{with_[-1]}**", gain_of(cells[-1]["gain"]),
            "–" if share is None else f"{100 * share:.0f} %",
        ])  # fmt: skip
    words = [f"with `{one['adapt']}`" for one in variations]
    head = ["merger", "without", *words, "gain [95 % interval]", "of the loss"]
    seeds = f"mean of {told['seeds']} seeds" if told["seeds"] > 1 else "one seed"
    ends = f"experts {points(variations[-1]['experts'])}, {seeds}"
    return f"Mean score in percent ({ends}), scale chosen on validation:\n\n{table(head, lines)}"


def written() -> dict[Path, str]:
    """Return every generated file and its text."""
    records = tomllib.loads((RESULTS / "records.toml").read_text(encoding="utf-8"))["record"]
    files: dict[Path, str] = {}
    sections = [HEAD]
    for record in records:
        told = json.loads((RESULTS / record["file"]).read_text(encoding="utf-8"))
        body = [f"    {record['command']}", record.get("about", "").strip(), KINDS[record["kind"]](told)]
        if record.get("by_task"):
            body += ["Task by task, and in the union of all tasks' classes (hits@1, mean over tasks):", by_task(told)]
        if record.get("over"):
            body += ["Over the first variation, paired [95 % interval]:", over_first(told)]
        if record.get("written"):
            body += ["Scales as written, and chosen on validation:", scales_of(told)]
        body.append(record.get("notes", "").strip())
        text = "\n\n".join(part for part in body if part) + "\n"
        title = f"{record['title']} ({record['date']})"
        sections.append(f"## {title}\n\n{text}")
        page = Path(record["file"]).with_suffix("")
        if record["kind"] == "suite" and told["gains"]:
            files[RESULTS / f"{page}.svg"] = gains_figure(told)
        if record["kind"] == "study" or "points" in told:
            files[RESULTS / f"{page}.svg"] = study_figure(told)
        if RESULTS / f"{page}.svg" in files:
            text = text + f"\n![{record['title']}]({page}.svg)\n"
        files[RESULTS / f"{page}.md"] = f"# {title}\n\n{text}"
    files[ROOT / "RECORDS.md"] = "\n".join(sections)
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if SHOWN.search(text := page.read_text(encoding="utf-8")):
            files[page] = shown(text)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--add", type=Path)
    parser.add_argument("--as", dest="name")
    told = parser.parse_args()
    if told.add:
        if not told.name:
            parser.error("--add needs --as NAME")
        made = told.add / ("study.json" if (told.add / "study.json").is_file() else "scores.json")
        shutil.copyfile(made, RESULTS / f"{told.name}.json")
        print(f"docs/results/{told.name}.json: now name it in docs/results/records.toml")
        return 0
    stale = {
        path: text
        for path, text in written().items()
        if not (told.check and path.suffix == ".svg")  # drawn a little differently by every matplotlib
        and not (path.is_file() and path.read_text(encoding="utf-8") == text)
    }
    for path, text in stale.items():
        print(("stale: " if told.check else "wrote ") + str(path.relative_to(ROOT)))
        if not told.check:
            path.write_text(text, encoding="utf-8")
    return 1 if told.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
