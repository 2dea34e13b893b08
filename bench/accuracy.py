"""Are the numbers the same? `merge_speed.py --accuracy` comes here.

Linear and task arithmetic: our merged tensors against mergekit's, entry by entry, and both against float64 rounded
once. Spectral steps: our merged delta against the textbook formula in float64 with a plain SVD, on the matrices of the
first and the last layer (a plain SVD of everything takes an hour).
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from merge_speed import Bench, Case, failure, run
from safetensors import safe_open

LAYERS = ("layers.0.", "layers.11.")
ALLOWED = 1e-4


class Model:
    """A checkpoint's tensors by name, read when asked for."""

    def __init__(self, folder: str | Path):
        self.files = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self.files |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)


def polar(x: torch.Tensor) -> torch.Tensor:
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


def tsv(deltas: list[torch.Tensor]) -> torch.Tensor:
    k = min(deltas[0].shape) // len(deltas)
    u, s, v = zip(*(torch.linalg.svd(d, full_matrices=False) for d in deltas), strict=True)
    left, right = torch.cat([x[:, :k] for x in u], 1), torch.cat([x[:k] for x in v], 0)
    return polar(left) @ torch.diag(torch.cat([x[:k] for x in s])) @ polar(right)


def iso_c(deltas: list[torch.Tensor]) -> torch.Tensor:
    u, s, v = torch.linalg.svd(sum(deltas), full_matrices=False)
    return s.mean() * u @ v


def iso_cts(deltas: list[torch.Tensor], share: float = 0.8) -> torch.Tensor:
    r, count = min(deltas[0].shape), len(deltas)
    own = round((r - int(r * share)) / count)
    c = r - own * count
    u, s, v = torch.linalg.svd(sum(deltas), full_matrices=False)
    parts = [(u[:, :c], s[:c], v[:c])]
    for delta in deltas:
        a, b, w = torch.linalg.svd(delta - u[:, :c] @ (u[:, :c].mT @ delta), full_matrices=False)
        parts.append((a[:, :own], b[:own], w[:own]))
    left, values, right = torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts]), [p[2] for p in parts]
    return values.mean() * polar(left) @ polar(torch.cat(right, 0))


def average(deltas: list[torch.Tensor]) -> torch.Tensor:
    return sum(deltas) / len(deltas)


PLAIN = {"tsv": tsv, "iso_c": iso_c, "iso_cts": iso_cts, "knots": average}  # aligned parts average to the average


def spectral(bench: Bench, case: Case, ours: Path) -> dict[str, Any]:
    """Largest relative error of our merged deltas, ||ours - plain|| / ||plain||, over the matrices looked at."""
    base, *experts = (Model(m) for m in bench.models(case))
    merged, worst = Model(ours), 0.0
    for name in base.files:
        origin = base[name].double()
        if origin.ndim == 2 and any(layer in name for layer in LAYERS):
            plain = PLAIN[case.told]([e[name].double() - origin for e in experts])
            worst = max(worst, float((merged[name].double() - origin - plain).norm() / plain.norm()))
    return {"largest relative error": worst, "allowed": ALLOWED, "met": worst <= ALLOWED}


def elementwise(bench: Bench, case: Case, ours: Path, peer: Path) -> dict[str, Any]:
    """Share of entries equal bit by bit, the largest difference, and the share off float64 rounded once, of both."""
    base, *experts = (Model(m) for m in bench.models(case))
    a, b = Model(ours), Model(peer)
    count = same = 0
    largest, off = 0.0, {"ours": 0, "peer": 0}
    for name in base.files:
        origin = base[name].double()
        total = sum(e[name].double() - origin for e in experts)
        factor = 0.4 if "scale" in case.sentence else 1 / len(experts)
        exact = (origin + factor * total).to(base[name].dtype)
        x, y = a[name], b[name]
        count += x.numel()
        same += int((x == y).sum())
        largest = max(largest, float((x.double() - y.double()).abs().max()))
        off["ours"] += int((x != exact).sum())
        off["peer"] += int((y != exact).sum())
    return {
        "entries equal": same / count, "largest difference": largest,
        "ours off float64": off["ours"] / count, "peer off float64": off["peer"] / count,
    }  # fmt: skip


def compare(bench: Bench, case: Case) -> dict[str, Any]:
    outs = {"ours": bench.work / "ours", "peer": bench.work / "peer"}
    plain = case.set == "clip"
    try:
        for way in ("ours",) if plain else ("ours", "peer"):
            shutil.rmtree(outs[way], ignore_errors=True)
            done = run(bench.ways(case)[way](outs[way]), 0)
            if done.status:
                return failure(way, case.peer, done)
        return spectral(bench, case, outs["ours"]) if plain else elementwise(bench, case, outs["ours"], outs["peer"])
    finally:
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)


def report(bench: Bench, cases: list[Case]) -> None:
    for case in cases:
        linear = case.peer == "mergekit" and case.name in ("average", "task_arithmetic")
        if linear or case.set == "clip":
            found = compare(bench, case)
            text = ", ".join(f"{k} {v:.7g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
            print(f"{case.set:8} {case.sentence:32} {text}", flush=True)
