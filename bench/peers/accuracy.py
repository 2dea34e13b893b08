"""How good the merged models are: mergekit, FusionBench and PEFT on the text suite's experts, side by side with ours.

    python bench/peers/install.py --to PEERS
    python bench/peers/accuracy.py --data TEXT_TASKS --peers PEERS --to OUT --out docs/results/peers_accuracy.json
    python bench/peers/accuracy.py ... --cases 'mergekit:*'          some; those measured before stay in the JSON
    python bench/peers/accuracy.py --table docs/results/peers_accuracy.json

Every merge is a process of its own, ours too, on the same folders (OUT/inputs); every merged folder is scored by
`merganser.evaluate` with the suite's heads and test rows. What is done in OUT is not done again.
"""

import argparse
import fnmatch
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import records  # noqa: E402

Told = dict[str, Any]
RANK = 16
ROUNDING = 1e-6  # of a tensor's length
ADAPTED = (
    "attention.self.query.weight",
    "attention.self.key.weight",
    "attention.self.value.weight",
    "attention.output.dense.weight",
)
FROZEN = ["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight",
          "embeddings.token_type_embeddings.weight", "pooler.dense.weight"]  # fmt: skip
EQUAL = "of entries exactly as large as the threshold it keeps any, we the first in memory"
BAND = "of entries exactly as large as a limit it keeps any, we all"
OURS = "import sys; from merganser.cli import main; sys.exit(main())"
VERSION = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
PACKAGES = {"mergekit": "mergekit", "fusion_bench": "fusion-bench", "peft": "peft"}


@dataclass(frozen=True)
class Case:
    """One row: the peer's merge, the sentence of ours that says the same, and why the two differ where they do.

    ``told``   mergekit: method, ``base`` (None: without one), ``each`` (parameters of a model) and ``shared``;
               FusionBench: method and knobs; PEFT: what `add_weighted_adapter` is told
    ``dice``   random: weights are not compared
    """

    peer: str
    name: str
    told: Told
    sentence: str
    dice: bool = False
    note: str = ""

    @property
    def slug(self) -> str:
        """The name of the case and of its folder."""
        return f"{self.peer}:{self.name}".replace(" ", "-").replace(",", "")


def cases() -> list[Case]:
    """Return every case, in the table's order."""
    return [*mergekit_cases(), *fusion_cases(), *peft_cases()]


def mergekit_cases() -> list[Case]:
    def case(name: str, sentence: str, note: str = "", dice: bool = False, **told: Any) -> Case:
        return Case("mergekit", name, told, sentence, dice, note)

    one = {"weight": 1.0}
    half = {**one, "density": 0.2}
    crumbs = {**one, "density": 0.9, "gamma": 0.01}
    by = {"lambda": 0.3}
    dare, della = 'dare(keep=0.2, rescale="l1")', 'della(density=0.2, rescale="l1")'
    ties = {"method": "ties", "each": half}
    dice = {"note": "other dice", "dice": True}
    return [
        case("linear", "average", method="linear", base=None, each=one),
        case("task_arithmetic", "task_arithmetic | scale(by=0.3)", method="task_arithmetic", each=one, shared=by),
        case("ties", 'ties(density=0.2, scope="tensor", equal="first")', EQUAL, **ties),
        case("ties, paper", "ties(density=0.2)", "mergekit trims each tensor, the paper the whole model", **ties),
        case("dare_linear", f"{dare} | task_arithmetic | scale(by=0.3)", method="dare_linear", each=half, shared=by, **dice),
        case("dare_ties", f'{dare} | ties(density=1.0, merge="sum") | scale(by=0.3)', method="dare_ties", each=half,
             shared=by, **dice),
        case("della", f"{della} | ties(density=1.0)", method="della", each=half, **dice),
        case("della_linear", f"{della} | task_arithmetic | scale(by=0.3)", method="della_linear", each=half, shared=by,
             **dice),
        case("breadcrumbs", "breadcrumbs(density=0.9, gamma=0.01) | task_arithmetic | scale(by=0.3)", BAND,
             method="breadcrumbs", each=crumbs, shared=by),
        case("breadcrumbs_ties", 'breadcrumbs(density=0.9, gamma=0.01) | ties(density=1.0, merge="sum") | scale(by=0.3)',
             BAND, method="breadcrumbs_ties", each=crumbs, shared=by),
        case("sce", "sce(density=0.1, floor=1e-6)", method="sce", shared={"select_topk": 0.1}),
        case("model_stock", "model_stock(floor=1e-6)", method="model_stock"),
        case("karcher", "karcher", method="karcher", base=None),
        case("multislerp", 'multislerp(on="weights")', method="multislerp", base=None, each=one),
        case("ram", "ram", method="ram"),
    ]  # fmt: skip


def fusion_cases() -> list[Case]:
    def case(method: str, sentence: str, note: str = "", name: str = "", dice: bool = False, **knobs: Any) -> Case:
        return Case("fusion_bench", name or method, {"method": method, **knobs}, sentence, dice, note)

    by = {"scaling_factor": 0.3}
    ties = {**by, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
    dare = {**by, "sparsity_ratio": 0.8, "only_on_linear_weights": False, "rescale": True}
    counts = "FusionBench's 20 % counts the frozen embeddings too, 42.7 % of what moved"
    keeps_all = "other dice; FusionBench's 20 % of the whole model is more than DARE left, so it trims nothing"
    return [
        case("average", "average"),
        case("task_arithmetic", "task_arithmetic | scale(by=0.3)", **by),
        case("ties", 'ties(density=0.42666814, merge="sum", rule="reference") | scale(by=0.3)', counts, **ties),
        case("ties", 'ties(density=0.2, merge="sum", rule="reference") | scale(by=0.3)', f"{counts}; ours: 20 %",
             "ties, moved only", **ties),
        case("dare", "dare(keep=0.2) | task_arithmetic | scale(by=0.3)", "other dice", dice=True, **dare),
        case("dare_ties", 'dare(keep=0.2) | ties(density=1.0, merge="sum") | scale(by=0.3)', keeps_all, dice=True,
             **{**ties, **dare}),
        case("magmax", "magmax | scale(by=0.5)", scaling_factor=0.5),
        case("model_stock", "model_stock", "FusionBench averages angles, the paper and we their cosines"),
        case("knots_ties", 'knots | ties(density=0.2, merge="sum", rule="reference") | scale(by=0.3)',
             "FusionBench's KnOTS helper, then its TIES", **by, density=0.2, merge_func="sum"),
        case("tsv", "tsv"),
        case("iso_c", "iso_c"),
        case("iso_cts", "iso_cts"),
        case("wudi", "wudi", "with the frozen matrices excluded: FusionBench divides by their norm, 0", iter_num=300,
             exclude_keys=FROZEN),
    ]  # fmt: skip


def peft_cases() -> list[Case]:
    def case(name: str, sentence: str, note: str = "", dice: bool = False, **told: Any) -> Case:
        return Case("peft", name, told, sentence, dice, note)

    total = "task_arithmetic | scale(by=0.3)"
    ties = 'ties(density=0.2, scope="tensor", equal="first")'
    cut = f"PEFT cuts the result to rank {RANK} (its default)"
    apart = "PEFT works on A and on B apart, which is not the update"
    full = {"svd_rank": 384}
    return [
        case("cat", total, combination_type="cat", weight=0.3),
        case("svd, full rank", total, combination_type="svd", weight=0.3, **full),
        case("svd", total, cut, combination_type="svd", weight=0.3),
        case("linear", total, apart, combination_type="linear", weight=0.3),
        case("ties_svd, full rank", ties, EQUAL, combination_type="ties_svd", weight=1.0, density=0.2, **full),
        case("ties_svd", ties, cut, combination_type="ties_svd", weight=1.0, density=0.2),
        case("ties", ties, apart, combination_type="ties", weight=1.0, density=0.2),
        case("magnitude_prune_svd, full rank", f'trim(density=0.2, scope="tensor", equal="first") | {total}', EQUAL,
             combination_type="magnitude_prune_svd", weight=0.3, density=0.2, **full),
        case("dare_linear_svd, full rank", f"dare(keep=0.2) | {total}", "other dice", True,
             combination_type="dare_linear_svd", weight=0.3, density=0.2, **full),
    ]  # fmt: skip


# What each tool is told


def mergekit_yaml(told: Told, base: str, experts: Sequence[str]) -> str:
    """Return the YAML of `mergekit-pytorch`: models are files of weights."""
    config: Told = {"merge_method": told["method"], "models": [{"model": e} for e in experts]}
    if told.get("each"):
        config["models"] = [{**model, "parameters": dict(told["each"])} for model in config["models"]]
    if told.get("base", True):
        config["base_model"] = base
    if told.get("shared"):
        config["parameters"] = told["shared"]
    return yaml.safe_dump({**config, "dtype": "float32"}, sort_keys=False)


def adapter_config(base: str, rank: int = RANK) -> Told:
    """Return PEFT's adapter_config.json for the attention matrices; alpha = rank, so the update is B A."""
    return {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": rank, "lora_alpha": rank, "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "target_modules": ["query", "key", "value", "attention.output.dense"],
    }  # fmt: skip


def factors(delta: Tensor, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Return A ``[rank, in]`` and B ``[out, rank]`` of the best update of that rank, singular values shared evenly."""
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).float().contiguous(), (u[:, :rank] * root).float().contiguous()


class Bench:
    """Where things are: inputs, every tool's merged folders, logs and scores."""

    def __init__(self, peers: Path, to: Path, ready: Any):
        self.peers, self.to, self.ready = peers.absolute(), to.absolute(), ready
        self.names = list(ready.experts)
        self.inputs = self.to / "inputs"
        self.key = ready.scored_on
        self.digests = ready.digests

    def python(self, peer: str) -> Path:
        return self.peers / peer / "bin" / "python"

    # inputs

    def write_inputs(self, adapters: bool) -> None:
        """Write base and experts without the integers that transformers computes anew and mergekit cannot merge."""
        from merganser.weights.open import open_weights

        sources = {"base": self.ready.recipe.model.base, **self.ready.recipe.experts}
        wholes = {name: floats(open_weights(source)) for name, source in sources.items()}
        for name, whole in wholes.items():
            self.folder(self.inputs / name, whole)
        for name in self.names if adapters else ():
            self.adapter(name, wholes["base"], wholes[name])

    def folder(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        if (folder / "model.safetensors").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        source = self.ready.recipe.model.base
        for file in ("config.json", "tokenizer.json"):
            shutil.copyfile(source / file, folder / file)
        write(folder / "model.safetensors", {n: t.contiguous() for n, t in weights.items()})

    def adapter(self, name: str, base: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> None:
        """Write an expert's adapter and the dense folder that says the same."""
        folder, dense = self.inputs / "adapters" / name, self.inputs / "dense" / name
        if (folder / "adapter_model.safetensors").is_file() and (dense / "model.safetensors").is_file():
            return
        folder.mkdir(parents=True, exist_ok=True)
        stored, whole = {}, dict(base)
        for tensor in (n for n in base if n.endswith(ADAPTED)):
            a, b = factors(expert[tensor] - base[tensor])
            module = "base_model.model." + tensor.removesuffix(".weight")
            stored |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            whole[tensor] = base[tensor] + b @ a
        self.folder(dense, whole)
        (folder / "adapter_config.json").write_text(json.dumps(adapter_config(str(self.inputs / "base")), indent=1))
        write(folder / "adapter_model.safetensors", stored)

    def models(self, case: Case) -> list[str]:
        experts = self.inputs / "dense" if case.peer == "peft" else self.inputs
        return [str(self.inputs / "base"), *(str(experts / name) for name in self.names)]

    # merges

    def theirs(self, case: Case, out: Path) -> list[str]:
        base, *experts = self.models(case)
        python = str(self.python(case.peer))
        if case.peer == "mergekit":
            files = [f"{folder}/model.safetensors" for folder in (base, *experts)]
            config = self.to / "configs" / f"{case.slug}.yml"
            config.parent.mkdir(exist_ok=True)
            config.write_text(mergekit_yaml(case.told, files[0], files[1:]))
            program = str(self.peers / "mergekit" / "bin" / "mergekit-pytorch")
            return [program, str(config), str(out), "--random-seed", "0"]
        if case.peer == "peft":
            experts = [str(self.inputs / "adapters" / name) for name in self.names]
        return [python, str(HERE / f"{case.peer}_merge.py"), json.dumps(case.told), str(out), base, *experts]

    def ours(self, case: Case, out: Path, seed: int) -> list[str]:
        merge = ["merge", *self.models(case), "--how", case.sentence, "--seed", str(seed), "--to", str(out)]
        return [sys.executable, "-c", OURS, *merge]

    def merge(self, case: Case, seed: int | None = None) -> Path:
        """Return the folder merged by the peer, or by us with a seed; one that is done is not made again."""
        who = case.peer if seed is None else "ours"
        adapters = "adapters" if case.peer == "peft" else "experts"
        told = case.told if seed is None else {"sentence": case.sentence, "seed": seed if case.dice else 0}
        key = short({"who": who, "told": told, "of": adapters, "digests": self.digests})
        out = self.to / who / key
        if (out / "done").is_file():
            return out
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        self.run(self.theirs(case, out) if seed is None else self.ours(case, out, seed), f"{who}-{key}")
        (out / "done").write_text(json.dumps(told))
        return out

    def run(self, command: Sequence[str], name: str) -> None:
        log = self.to / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            status = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            ).returncode
        if status:
            lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
            raise MergeError(
                f"{lines[-1][:300]} (OUT/{log.relative_to(self.to)})"
            )  # no path of this machine in results

    # scores

    def weights(self, folder: Path) -> dict[str, Tensor]:
        """Return a merged folder's tensors under the base's names. Raises MergeError where one is missing."""
        from merganser.weights.open import open_weights

        found, base = open_weights(folder), self.ready.base
        missing = [n for n in base if base[n].is_floating_point() and n not in found]
        if missing:
            raise MergeError(f"OUT/{folder.relative_to(self.to)}: no tensor '{missing[0]}'")
        return {n: (found[n].to(t.dtype) if t.is_floating_point() else t) for n, t in base.items()}

    def score(self, weights: Mapping[str, Tensor], only: str | None = None) -> Told:
        """Return score and predictions of every task, or of one; the same weights are not scored twice."""
        from merganser.card import digest, read_json, write_json
        from merganser.evaluate.run import Model, evaluate

        path = self.to / "scores" / f"{short([digest(weights), self.key, *([only] if only else [])])}.json"
        found = read_json(path)
        if found is None:
            ready = self.ready
            tasks = {name: task for name, task in ready.test.items() if only in (None, name)}
            scores = evaluate(Model(ready.encoder, weights, ready.heads, ready.kind), tasks)
            found = {n: {"score": o.score, "predictions": o.predictions.tolist()} for n, o in scores.items()}
            path.parent.mkdir(exist_ok=True)
            write_json(path, found)
        return found

    def distance(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Told:
        return distance(self.ready.base, ours, theirs)


class MergeError(Exception):
    """A merge that failed, and what it said."""


def floats(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name in weights if (tensor := weights[name]).is_floating_point()}


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file of weights at once or not at all."""
    part = path.with_name(f".{path.name}")
    save_file(tensors, part, {"format": "pt"})
    part.replace(path)


def short(settings: Any) -> str:
    from merganser.card import key_of

    return key_of(settings)[:16]


def distance(base: Mapping[str, Tensor], ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Told:
    """Return ||ours - theirs|| / ||theirs - base||: of the whole model and the largest of a tensor, with its name.

    A tensor that both left in place but for rounding counts in neither.
    """
    apart, moved, largest, where = 0.0, 0.0, 0.0, ""
    for name, origin in base.items():
        if not origin.is_floating_point():
            continue
        a, b, o = (weights[name].double() for weights in (ours, theirs, base))
        off, way, own = (float(x.norm()) for x in (a - b, b - o, a - o))
        if max(way, own) <= ROUNDING * float(o.norm()):
            continue
        ratio = off / way if way else math.inf
        apart, moved = apart + off**2, moved + way**2
        if ratio > largest or math.isnan(ratio):
            largest, where = ratio, name
    return {"largest": largest, "tensor": where, "whole": math.sqrt(apart / moved) if moved else 0.0}


def compared(case: Case, ours: Told, theirs: Told) -> Told:
    """Return a row's numbers from the two models' scores and predictions."""
    means = {
        who: sum(t["score"] for t in told.values()) / len(told) for who, told in (("ours", ours), ("peer", theirs))
    }
    gaps = {name: ours[name]["score"] - theirs[name]["score"] for name in ours}
    task = max(gaps, key=lambda name: abs(gaps[name]))
    pairs = [p == q for n in ours for p, q in zip(ours[n]["predictions"], theirs[n]["predictions"], strict=True)]
    return {
        "case": case.name, "peer": case.peer, "told": case.told, "sentence": case.sentence, "dice": case.dice,
        "ours": means["ours"], "theirs": means["peer"], "difference": means["ours"] - means["peer"],
        "largest": {"task": task, "difference": gaps[task]}, "same predictions": sum(pairs) / len(pairs),
        "tasks": {n: {"ours": ours[n]["score"], "theirs": theirs[n]["score"]} for n in ours}, "note": case.note,
    }  # fmt: skip


def measured(bench: Bench, case: Case, seeds: int) -> Told:
    """Merge a case with both tools, score both, compare."""
    theirs, ours = bench.weights(bench.merge(case)), bench.weights(bench.merge(case, seed=0))
    row = compared(case, bench.score(ours), bench.score(theirs))
    if not case.dice:
        return {**row, "weights": bench.distance(ours, theirs)}
    others = [bench.score(bench.weights(bench.merge(case, seed=seed))) for seed in range(1, seeds)]
    return {**row, "seeds": [row["ours"], *(sum(t["score"] for t in o.values()) / len(o) for o in others)]}


def text_suite(data: Path, experts: Path | None) -> Any:
    """Return base, experts, heads and test rows as the text suite has them.

    ``experts``: a folder with FOLDER/TASK made before, instead of the suite's own cache.
    """
    from merganser.prepare import prepare
    from merganser.progress import bars
    from merganser.recipe import ModelPart, Recipe
    from merganser.suites.cache import cache_folder
    from merganser.suites.suite import make_experts
    from merganser.suites.text import SUITE

    tasks, base = SUITE.tasks(data), SUITE.base()
    recipe = Recipe(
        title="peers", command="bench/peers/accuracy.py", sentences=["average"], scales=[],
        model=ModelPart(base=base, encoder=SUITE.encoder, options=dict(SUITE.options), precision=SUITE.precision),
        experts=dict.fromkeys(tasks, base), tasks=SUITE.folders(data, tasks), heads=SUITE.heads, limits=SUITE.limits,
    )  # fmt: skip
    if experts is None:
        made = make_experts(SUITE, recipe, tasks, cache_folder() / SUITE.name, bars)
    else:
        made = {name: experts.absolute() / name for name in tasks}
    return prepare(recipe.model_copy(update={"experts": made}), progress=bars)


def versions(bench: Bench, peers: Sequence[str]) -> dict[str, str]:
    from merganser.card import versions as own

    found = own()
    for peer in peers:
        command = [str(bench.python(peer)), "-c", VERSION, PACKAGES[peer]]
        found[peer] = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return found


def ends(bench: Bench, adapters: bool) -> Told:
    """Return what the base scores, what every expert scores on its own task, and so for experts cut to adapters."""

    def own(weights: Mapping[str, Mapping[str, Tensor]]) -> float:
        return sum(bench.score(one, name)[name]["score"] for name, one in weights.items()) / len(weights)

    base = bench.score(bench.ready.base)
    found = {"base": sum(t["score"] for t in base.values()) / len(base), "experts": own(bench.ready.experts)}
    if adapters:
        found["adapters"] = own({n: bench.weights(bench.inputs / "dense" / n) for n in bench.names})
    return found


def need(peers: Path, names: Sequence[str]) -> None:
    """Stop where a peer's environment is missing, and say how to make it."""
    missing = [name for name in names if not (peers / name / "bin" / "python").exists()]
    if missing:
        sys.exit(f"{peers / missing[0]}: no environment; run python bench/peers/install.py {missing[0]} --to {peers}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the text suite's tasks")
    parser.add_argument("--peers", type=Path, help="where install.py put the peers")
    parser.add_argument("--to", type=Path, help="where merged models, logs and scores go; 90 MB a model")
    parser.add_argument("--out", type=Path, help="the JSON file, written after every case")
    parser.add_argument("--experts", type=Path, help="experts made before, EXPERTS/TASK (default: the suite's own)")
    parser.add_argument("--cases", nargs="+", default=["*"], help="PEER:NAME, with * and ?")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of ours for random methods")
    parser.add_argument("--table", type=Path, help="print the table of such a file and do nothing else")
    parser.add_argument("--list", action="store_true", help="name the cases and do nothing else")
    told = parser.parse_args()
    chosen = [case for case in cases() if any(fnmatch.fnmatch(case.slug, p) for p in told.cases)]
    if told.list:
        return print("\n".join(f"{case.slug:45} {case.sentence}" for case in chosen))
    if told.table:
        return print(records.peers(json.loads(told.table.read_text())))
    if not (told.data and told.peers and told.to and told.out):
        parser.error("--data, --peers, --to and --out are needed")
    need(told.peers, sorted({case.peer for case in chosen}))
    bench = Bench(told.peers, told.to, text_suite(told.data, told.experts))
    before = json.loads(told.out.read_text()) if told.out.is_file() else {"rows": []}
    adapters = any(case.peer == "peft" for case in chosen)
    bench.write_inputs(adapters)
    results = {
        **before, "title": "peers", "date": time.strftime("%Y-%m-%d"),
        "command": "python bench/peers/accuracy.py --data TEXT_TASKS --peers PEERS --to OUT --out peers_accuracy.json",
        "versions": {**before.get("versions", {}), **versions(bench, sorted({case.peer for case in chosen}))},
        "digests": bench.digests, "ends": {**before.get("ends", {}), **ends(bench, adapters)},
        "tasks": [{"name": n, "test": len(t), "metric": t.metric} for n, t in bench.ready.test.items()],
    }  # fmt: skip
    order = [case.slug for case in cases()]
    rows = {f"{row['peer']}:{row['case']}".replace(" ", "-").replace(",", ""): row for row in before["rows"]}
    for at, case in enumerate(chosen, 1):
        started = time.monotonic()
        try:
            rows[case.slug] = row = measured(bench, case, told.seeds)
            said = f"ours {100 * row['ours']:.2f}, theirs {100 * row['theirs']:.2f}"
        except MergeError as error:
            rows[case.slug] = {"case": case.name, "peer": case.peer, "sentence": case.sentence, "failed": str(error)}
            said = f"failed: {error}"
        print(f"[{at}/{len(chosen)}] {case.slug}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
        results["rows"] = [rows[slug] for slug in order if slug in rows]
        told.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + records.peers(results))


if __name__ == "__main__":
    main()
