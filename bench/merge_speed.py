"""How fast and how small a merge is: whole processes, side by side with mergekit and FusionBench.

    python bench/checkpoints.py --to DATA
    python bench/peers/install.py --to PEERS
    python bench/merge_speed.py --data DATA --peers PEERS --out results.json            every case
    python bench/merge_speed.py --data DATA --peers PEERS --cases 'ties*' --repeats 1   some, quickly
    python bench/merge_speed.py --data DATA --peers PEERS --accuracy                    are the numbers the same?
    python bench/merge_speed.py --table results.json                                    the table again

Each round runs ours, the peer and two yardsticks (a copy of the same bytes, torch's import) in turn, every other round
backwards; ratios are taken round by round, so they hold when the machine's speed drifts. CPU seconds are the finished
process's own (user + system, with its children). Anonymous memory is RssAnon of the process and its children, sampled
every 20 ms: what a memory limit counts, without the pages of input files, which the kernel can drop.
"""

import argparse
import fnmatch
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from checkpoints import SETS, write

HERE = Path(__file__).parent
MIB = 1 << 20
EVERY = 0.02  # seconds between two looks at the memory


@dataclass
class Run:
    """What one process cost."""

    cpu: float
    wall: float
    anon: float  # MiB, at the peak
    status: int
    said: str  # the end of what it printed


@dataclass
class Case:
    """One row: a sentence on a set, the peer's way to the same model, and what is claimed."""

    name: str
    sentence: str = ""
    peer: str = ""  # "mergekit", "fusion_bench", ""
    told: Any = None  # mergekit's configuration (a function of base and experts) or FusionBench's method
    set: str = ""
    experts: int = 0  # the first so many; 0: all
    threads: int = 1  # 0: as many as there are cores
    cpu: float | None = None  # at most this share of the peer's CPU seconds
    wall: float | None = None  # of its wall seconds
    memory: float | None = None  # of its anonymous memory
    floor: bool = False  # at most two copies of the same bytes plus torch's import, in CPU seconds
    seconds: float | None = None  # at most so many CPU seconds
    ours: tuple[str, ...] = ()  # arguments, where it is not a merge


def watch(pid: int, stop: threading.Event, peaks: list[float]) -> None:
    """Keep the largest sum of RssAnon over a process and its children."""
    family, looks = [pid], 0
    while not stop.wait(EVERY):
        looks += 1
        if looks % 10 == 1:
            family = [pid, *children(pid)]
        peaks.append(sum(anonymous(p) for p in family))


def anonymous(pid: int) -> float:
    try:
        with open(f"/proc/{pid}/status") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    return 0.0


def children(pid: int) -> list[int]:
    parents = {}
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as file:  # noqa: PTH123
                    parents[int(entry)] = int(file.read().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError, ValueError):
                continue
    found, fresh = [], [pid]
    while fresh:
        fresh = [child for child, parent in parents.items() if parent in fresh]
        found += fresh
    return found


def run(command: list[str], threads: int, most: float | None = None) -> Run:
    """Run a command to its end, or kill it after ``most`` seconds, and account for it."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment.pop(name, None)
        if threads:
            environment[name] = str(threads)
    with tempfile.TemporaryFile() as printed:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, env=environment, cwd=HERE)
        stop, peaks = threading.Event(), [0.0]
        watcher = threading.Thread(target=watch, args=(process.pid, stop, peaks))
        watcher.start()
        clock = threading.Timer(most or 0, process.kill)
        if most:
            clock.start()
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        clock.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if most and wall >= most and process.returncode == -9:
            process.returncode = 0  # stopped: it costs more than what is accounted for
        stop.set()
        watcher.join()
        printed.seek(0)
        said = printed.read().decode(errors="replace")[-2000:]
    return Run(used.ru_utime + used.ru_stime, wall, max(peaks), process.returncode, said)


# What mergekit is asked for


def mergekit(method: str, *, on_base: bool = True, shared: dict | None = None, **each: float) -> Callable[..., dict]:
    """Return mergekit's configuration as a function of base, experts and dtype."""

    def config(base: str, experts: list[str], dtype: str) -> dict:
        models = [{"model": e, **({"parameters": each} if each else {})} for e in experts]
        if method == "slerp":
            models = [{"model": base}, *models]
        told: dict[str, Any] = {"merge_method": method, "models": models, "dtype": dtype}
        if on_base:
            told["base_model"] = base
        if shared:
            told["parameters"] = shared
        return told

    return config


LINEAR = mergekit("linear", on_base=False, weight=1.0)
TASK = mergekit("task_arithmetic", weight=1.0, shared={"lambda": 0.4})
TIES = mergekit("ties", weight=1.0, density=0.2)
DARE_TIES = mergekit("dare_ties", weight=1.0, density=0.2)
DELLA = mergekit("della", weight=1.0, density=0.2)
TASK_SENTENCE = "task_arithmetic | scale(by=0.4)"


def merges_of(data: str, ties: float) -> list[Case]:
    """The cases that both dtypes of the middle Llama have; ``ties``: what is claimed for that method."""
    on = {"set": data, "peer": "mergekit"}
    fast = {**on, "cpu": 0.35, "floor": True}
    less, fusion = {**on, "cpu": 0.3}, {"set": data, "peer": "fusion_bench", "cpu": 0.35}
    tenth = mergekit("dare_ties", weight=1.0, density=0.1)
    cut = mergekit("breadcrumbs", weight=1.0, density=0.9, gamma=0.01)
    return [
        Case("average", "average", told=LINEAR, **fast),
        Case("task_arithmetic", TASK_SENTENCE, told=TASK, **fast),
        Case("ties, model", 'ties(density=0.2, scope="model")', told=TIES, cpu=ties, **on),
        Case("ties, tensor", 'ties(density=0.2, scope="tensor")', told=TIES, cpu=ties, **on),
        Case("dare, ties", "dare(keep=0.2) | ties(density=1.0)", told=DARE_TIES, **less),
        Case("dare, ties as written", "dare | ties", told=tenth, **less),
        Case("dare, ties trimmed", "dare(keep=0.2) | ties(density=0.2)", told=DARE_TIES, **less),
        Case("della", "della(density=0.2) | ties(density=1.0)", told=DELLA, **less),
        Case("breadcrumbs", "breadcrumbs(density=0.9, gamma=0.01) | task_arithmetic", told=cut, **less),
        Case("sce", "sce(density=0.2)", told=mergekit("sce", shared={"select_topk": 0.2}), **less),
        Case("model_stock", "model_stock", told=mergekit("model_stock"), **less),
        Case("slerp", "slerp(t=0.5)", told=mergekit("slerp", shared={"t": 0.5}), experts=1, **less),
        Case("karcher", "karcher", told=mergekit("karcher", on_base=False), **less),
        Case("average, FusionBench", "average", told="average", **fusion),
        Case("task_arithmetic, FusionBench", TASK_SENTENCE, told="task_arithmetic", **fusion),
    ]


def cases() -> list[Case]:
    """Every case, in the table's order."""
    clip = {"set": "clip", "peer": "fusion_bench", "threads": 0, "wall": 0.4, "memory": 0.1}
    return [
        Case("start: --help", ours=("--help",), peer="mergekit", told="--help", seconds=0.3),
        Case("start: ls", ours=("ls",), peer="fusion_bench", told="--help", seconds=0.3),
        *merges_of("m-bf16", ties=0.2),
        *merges_of("m-fp32", ties=0.1),
        Case("average", "average", set="l-fp32", peer="mergekit", told=LINEAR, cpu=0.35, floor=True),
        Case("tsv", 'tsv(conv="mean")', told="tsv", **clip),
        Case("iso_c", 'iso_c(conv="mean")', told="iso_c", **clip),
        Case("iso_cts", 'iso_cts(conv="mean")', told="iso_cts", **clip),
        Case("knots", "knots | average", told="knots", **clip),
        Case("memory, 2 experts", "average", set="xl-fp32", experts=2),
        Case("memory, 4 experts", "average", set="xl-fp32"),
        Case("memory, ties, 2 experts", "ties(density=0.2)", set="xl-fp32", experts=2),
        Case("memory, ties, 4 experts", "ties(density=0.2)", set="xl-fp32"),
    ]  # fmt: skip


class Bench:
    """Where things are, and how a case becomes commands."""

    def __init__(self, data: Path, peers: Path, work: Path, merganser: str, most: float | None = None):
        self.most = most
        self.data, self.peers, self.work, self.merganser = data.absolute(), peers.absolute(), work, merganser

    def models(self, case: Case) -> list[str]:
        folder = self.data / case.set
        count = case.experts or SETS[case.set].experts
        return [str(folder / name) for name in ("base", *(f"e{k + 1}" for k in range(count)))]

    def ours(self, case: Case, out: Path) -> list[str]:
        if case.ours:
            return [self.merganser, *case.ours]
        return [self.merganser, "merge", *self.models(case), "--how", case.sentence, "--to", str(out)]

    def peer(self, case: Case, out: Path) -> list[str]:
        program = {"mergekit": "mergekit-yaml", "fusion_bench": "fusion_bench"}[case.peer]
        if not case.set:
            return [str(self.peers / case.peer / "bin" / program), case.told]
        base, *experts = self.models(case)
        if case.peer == "fusion_bench":
            python = str(self.peers / "fusion_bench" / "bin" / "python")
            return [python, str(HERE / "peers" / "fusion_bench_merge.py"), case.told, str(out), base, *experts]
        config = self.work / "config.yml"
        kind = "bfloat16" if case.set.endswith("bf16") else "float32"
        config.write_text(json.dumps(case.told(base, experts, kind)))  # JSON is YAML
        return [str(self.peers / "mergekit" / "bin" / program), str(config), str(out), "--no-copy-tokenizer"]

    def ways(self, case: Case) -> dict[str, Callable[[Path], list[str]]]:
        """The processes of one round by name, each a function of its output folder."""
        ways: dict[str, Callable[[Path], list[str]]] = {"ours": lambda out: self.ours(case, out)}
        if case.peer:
            ways["peer"] = lambda out: self.peer(case, out)
        if case.set:
            copy = [sys.executable, "-I", "-S", str(HERE / "copy_bytes.py")]
            ways["copy"] = lambda out: [*copy, str(out), *self.models(case)]
        ways["import"] = lambda out: [sys.executable, "-c", "import torch"]
        return ways

    def once(self, case: Case, way: str) -> Run:
        out = self.work / way
        shutil.rmtree(out, ignore_errors=True)
        result = run(self.ways(case)[way](out), case.threads, self.most if way == "peer" else None)
        shutil.rmtree(out, ignore_errors=True)
        return result

    def measure(self, case: Case, repeats: int) -> dict[str, Any]:
        """Run a case's rounds; a step or verb that does not exist yet is said to be so."""
        row: dict[str, Any] = {"case": case.name, "set": case.set, "sentence": case.sentence, "peer": case.peer}
        if case.set:
            write(case.set, self.data)
            self.once(case, "copy")  # warms the page cache, not counted
        ways = list(self.ways(case))
        rounds: list[dict[str, Run]] = []
        for k in range(repeats):
            done: dict[str, Run] = {}
            for way in ways if k % 2 == 0 else reversed(ways):
                done[way] = self.once(case, way)
                if done[way].status != 0:
                    return {**row, **failure(way, case.peer, done[way])}
            rounds.append(done)
        row |= {"state": "measured", "threads": case.threads, "repeats": repeats}
        if self.most and any(done["peer"].wall >= self.most for done in rounds if "peer" in done):
            row["stopped"] = self.most  # the peer's seconds and memory are lower bounds, ratios upper ones
        row["runs"] = [
            {way: {k: v for k, v in asdict(r).items() if k not in ("said", "status")} for way, r in done.items()}
            for done in rounds
        ]
        return row | summary(case, rounds)


def failure(way: str, peer: str, run: Run) -> dict[str, str]:
    lines = run.said.strip().splitlines() or [f"exit status {run.status}"]
    unknown = way == "ours" and any(s in run.said for s in ("unknown step", "No such command"))
    return {"state": "not there" if unknown else f"{peer if way == 'peer' else way} failed", "said": lines[-1][:300]}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def limit(case: Case) -> float:
    """MiB of anonymous memory claimed: 350 plus experts + 3 times the largest tensor in fp32."""
    told = SETS[case.set]
    return 350 + ((case.experts or told.experts) + 3) * max(map(math.prod, told.shapes.values())) * 4 / MIB


def summary(case: Case, rounds: list[dict[str, Run]]) -> dict[str, Any]:
    """Medians, ratios round by round, and which claims hold."""
    found: dict[str, Any] = {"cpu": {}, "wall": {}, "anon": {}, "ratio": {}}
    for way in rounds[0]:
        for what in ("cpu", "wall", "anon"):
            found[what][way] = spread([getattr(r[way], what) for r in rounds])
    if case.peer:
        for what in ("cpu", "wall", "anon"):
            found["ratio"][what] = spread([getattr(r["ours"], what) / getattr(r["peer"], what) for r in rounds])
    claims: dict[str, dict[str, float]] = {}
    for what, share in (("cpu", case.cpu), ("wall", case.wall), ("anon", case.memory)):
        if share is not None:
            claims[f"{what} to {case.peer}"] = {"found": found["ratio"][what]["median"], "at most": share}
    if case.set:
        found["ratio"]["copy"] = spread([r["ours"].cpu / r["copy"].cpu for r in rounds])
        shares = [r["ours"].cpu / (2 * r["copy"].cpu + r["import"].cpu) for r in rounds]
        found["ratio"]["floor"] = spread(shares)
        if case.floor:
            claims["cpu to 2 copies + import"] = {"found": found["ratio"]["floor"]["median"], "at most": 1.0}
        claims["anonymous MiB"] = {"found": found["anon"]["ours"]["max"], "at most": limit(case)}
    if case.seconds is not None:
        claims["cpu seconds"] = {"found": found["cpu"]["ours"]["median"], "at most": case.seconds}
    return found | {"claims": claims, "met": all(c["found"] <= c["at most"] for c in claims.values())}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown. Where the claim is about wall seconds, these are shown, else CPU seconds."""
    head = [
        "case", "set", "peer", "ours s", "peer s", "ratio [min-max]", "to copy", "to 2 copies + import",
        "ours MiB", "peer MiB", "claims", "met",
    ]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        if row["state"] != "measured":
            cells = [row["case"], row["set"], row["peer"], row["state"], row["said"].replace("|", "/")[:90]]
            cells += [""] * (len(head) - len(cells))
        else:
            what = "wall" if row["threads"] == 0 else "cpu"
            seconds = {way: f"{v['median']:.2f}{' wall' if what == 'wall' else ''}" for way, v in row[what].items()}
            anon = {way: f"{v['max']:.0f}" for way, v in row["anon"].items()}
            r = row["ratio"]
            cells = [row["case"], row["set"], row["peer"], seconds["ours"], seconds.get("peer", "")]
            cells.append(f"{r[what]['median']:.2f} [{r[what]['min']:.2f}-{r[what]['max']:.2f}]" if what in r else "")
            cells += [f"{r[k]['median']:.2f}" if k in r else "" for k in ("copy", "floor")]
            cells += [anon["ours"], anon.get("peer", "")]
            cells.append("; ".join(f"{k} <= {c['at most']:.4g}" for k, c in row["claims"].items()))
            missed = [f"{k} {c['found']:.3g}" for k, c in row["claims"].items() if c["found"] > c["at most"]]
            cells.append("yes" if row["met"] else "**no**: " + "; ".join(missed))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version(),
        "system": platform.platform(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="where the checkpoints are, or are written")
    parser.add_argument("--peers", type=Path, help="where install.py put the peers (default: DATA/../peers)")
    parser.add_argument("--work", type=Path, help="where the outputs go for a moment (default: DATA)")
    parser.add_argument("--cases", nargs="+", default=["*"], help="names, with * and ?")
    parser.add_argument("--sets", nargs="+", default=["*"], help=f"of {', '.join(SETS)}; none: '' (start-up)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for everything measured, written after every case")
    parser.add_argument("--table", type=Path, help="print the table of such a file and do nothing else")
    parser.add_argument("--stop-peer", type=float, help="seconds after which a peer is stopped; it then counts as more")
    parser.add_argument("--accuracy", action="store_true", help="compare the outputs instead of the times")
    parser.add_argument("--merganser", default=str(Path(sys.executable).parent / "merganser"))
    parser.add_argument("--list", action="store_true", help="name the cases and do nothing else")
    told = parser.parse_args()
    chosen = [
        case for case in cases()
        if any(fnmatch.fnmatch(case.name, p) for p in told.cases) and any(fnmatch.fnmatch(case.set, p) for p in told.sets)
    ]  # fmt: skip
    if told.list:
        return print("\n".join(f"{c.set or '-':8} {c.name:30} {c.sentence or ' '.join(c.ours)}" for c in chosen))
    if told.table:
        return print(table(json.loads(told.table.read_text())["rows"]))
    if told.data is None:
        parser.error("--data is needed")
    with tempfile.TemporaryDirectory(dir=told.work or told.data, prefix=".bench-") as work:
        peers = told.peers or told.data.absolute().parent / "peers"
        bench = Bench(told.data, peers, Path(work), told.merganser, told.stop_peer)
        if told.accuracy:
            from accuracy import report

            return report(bench, chosen)
        rows = []
        for case in chosen:
            rows.append(bench.measure(case, told.repeats))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
            if told.out:
                told.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
