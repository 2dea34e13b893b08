"""A merge of adapters written as one adapter: what PEFT loads, of a chosen rank, with what the rank left out.

    Delta ~ B A,    the leading singular triplets of the merged delta,    error = |Delta - B A| / |Delta|

Where the merged delta is known as a product (linear sentences, those that begin with `knots` or `core`) it is
decomposed from its factors, and the base's tensors are not needed.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .card import key_of, write_card
from .deltas import applied
from .errors import WeightsError
from .fingerprint import Seen
from .job import Job
from .loop import Piece, by_factors, merge_each, stays_linear
from .progress import Progress, silent
from .steps.krylov import leading
from .survey import survey
from .weights.adapter import CONFIG, FILES, PREFIX, Adapted, Adapter, Factors
from .weights.header import header, shape_of
from .weights.parts import inputs_of
from .weights.save import short, write_readme
from .weights.sink import DTYPES, Sink

Rank = int | str | None
ROUNDING = 1e-5  # what is left out, squared, cannot be told from a difference of squares below this share
KEPT = ("task_type", "auto_mapping", "base_model_name_or_path", "revision")  # of the experts' configs, where they agree


@dataclass(frozen=True)
class Slot:
    """One tensor that becomes a pair of factors: its module's path, how PEFT calls and turns them, and their rank."""

    module: str
    kind: str
    turned: bool
    shape: tuple[int, ...]
    rank: int

    def names(self) -> tuple[str, str]:
        """Return the names of A and B in the file."""
        one, two = (
            ("lora_embedding_A", "lora_embedding_B") if self.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        )
        return f"{PREFIX}{self.module}.{one}", f"{PREFIX}{self.module}.{two}"

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B in the file."""
        out, inner = (self.shape[1], self.shape[0]) if self.crossed else (self.shape[0], self.shape[1])
        more = self.shape[2:]
        return (self.rank, inner, *more), (out, self.rank, *(1 for _ in more))

    @property
    def crossed(self) -> bool:
        """Whether A belongs to the tensor's rows: an embedding's, a Conv1D's."""
        return self.turned or self.kind == "embedding"

    def stored(self, low: Factors) -> tuple[Tensor, Tensor]:
        """Return A and B as they are in the file, zeros where the rank is more than there is."""
        b, a = (low.right.mT, low.left.mT) if self.crossed else low
        shape_a, shape_b = self.shapes()
        a = torch.cat([a, a.new_zeros(self.rank - len(a), a.shape[1])])
        b = torch.cat([b, b.new_zeros(len(b), self.rank - b.shape[1])], dim=1)
        return a.reshape(shape_a), b.reshape(shape_b)


class Plan:
    """What one adapter holds of a job's tensors: pairs of factors, and what has to be there in full.

    Raises WeightsError: an expert that is no adapter; a rank that is none, or "exact" where the merge is no product of
    that rank; a tensor in full that the base does not give.
    """

    def __init__(self, job: Job, rank: Rank = None):
        self.job, self.rank = job, rank
        self.experts: dict[str, Adapted] = {}
        for who, weights in job.experts.items():
            if not isinstance(weights, Adapted):
                raise WeightsError(
                    f"expert '{who}' is no adapter, and only adapters are merged into one; leave --as-adapter out"
                )
            self.experts[who] = weights
        if not (
            rank is None or rank == "exact" or (isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1)
        ):
            raise WeightsError(f"rank must be a whole number of at least 1, or 'exact', got {rank!r}")
        largest = max((m.rank for w in self.experts.values() for m in w.adapter.modules.values()), default=1)
        self.width = largest if rank is None else rank
        touched = [name for name in job.names if job.touched(name)]
        self.slots = {n: self._slot(n) for n in touched if any(n in w.modules for w in self.experts.values())}
        if not self.slots:
            raise WeightsError("no expert has a LoRA module that is merged; leave --as-adapter out")
        self.full: dict[str, str] = {}  # name in the base to name in the file
        self.biases: list[str] = []
        self.saved: list[str] = []
        for name in touched:
            if name not in self.slots and name not in self.full:
                self._in_full(name)
        self.spec = self._spec()

    def _slot(self, name: str) -> Slot:
        who = next(who for who, w in self.experts.items() if name in w.modules)
        one = self.experts[who]
        module = one.adapter.modules[one.modules[name]]
        width = self.width
        if self.rank == "exact":
            width = sum(w.adapter.modules[w.modules[name]].rank for w in self.experts.values() if name in w.modules)
            self._check_exact(name)
        return Slot(one.modules[name], module.kind, name in one.turned, shape_of(self.job.base, name), int(width))

    def _check_exact(self, name: str) -> None:
        steps = self.job.steps(name)
        at = next(k for k, step in enumerate(steps) if step.kind == "combine")
        first = bool(by_factors(steps[0])) and stays_linear(steps[at + 1 :])
        if not (stays_linear(steps) or first):
            raise WeightsError(
                f"'{self.job.sentence}' is not linear, so what it makes of '{name}' has no exact low rank; give a rank, "
                f"such as {self.width if isinstance(self.width, int) else 64}, or begin with knots or core"
            )
        for who, weights in self.experts.items():
            if weights.touches(name) and not weights.is_low(name):
                raise WeightsError(
                    f"expert '{who}' changes '{name}' by more than a product (DoRA, or in full); give a rank"
                )

    def _in_full(self, name: str) -> None:
        """Find a place for a tensor that is no pair of factors: a bias, or a whole module in modules_to_save."""
        module, _, last = name.rpartition(".")
        if getattr(self.job.base, "made_up", False):
            raise WeightsError(
                f"'{name}' is trained in full, which an adapter holds as base plus change; give the base"
            )
        path = self._path(name).rpartition(".")[0]
        if f"{module}.weight" in self.slots or (
            last == "bias" and any(w.adapter.config.get("bias") not in (None, "none") for w in self.experts.values())
        ):
            self.biases.append(name)
            self.full[name] = (
                f"{PREFIX}{path}.base_layer.bias" if f"{module}.weight" in self.slots else f"{PREFIX}{path}.bias"
            )
            return
        if not module:
            raise WeightsError(f"'{name}' is changed outside LoRA and belongs to no module, so no adapter holds it")
        self.saved.append(path)
        for other in self.job.base:
            if other.rpartition(".")[0] == module:
                self.full[other] = f"{PREFIX}{path}.{other.rpartition('.')[2]}"

    def _path(self, name: str) -> str:
        """Return a tensor's name in the network that the adapters were trained on."""
        for weights in self.experts.values():
            if name in weights.full:
                return next(n for n in weights.adapter.full if weights.seen_as(n) == name)
            if name in weights.biases:
                return f"{weights.biases[name]}.bias"
        return name

    def _spec(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        spec = {}
        for slot in self.slots.values():
            for key, shape in zip(slot.names(), slot.shapes(), strict=True):
                spec[key] = ("F32", shape)
        return spec | {key: header(self.job.base, name) for name, key in self.full.items()}

    def config(self) -> dict[str, Any]:
        """Return adapter_config.json: scale 1 everywhere (alpha = r), ranks of their own where they differ."""
        configs = [weights.adapter.config for weights in self.experts.values()]
        common = {key: configs[0].get(key) for key in KEPT if all(c.get(key) == configs[0].get(key) for c in configs)}
        ranks = [slot.rank for slot in self.slots.values()]
        most = max(set(ranks), key=lambda r: (ranks.count(r), r))
        # PEFT takes the first pattern that fits the end of a path: the longest first, so that none shadows another
        other = {s.module: s.rank for s in sorted(self.slots.values(), key=lambda s: -len(s.module)) if s.rank != most}
        owned = all(f"{name.rpartition('.')[0]}.weight" in self.slots for name in self.biases)
        turned = [s.turned for s in self.slots.values() if s.kind == "linear"]
        made_up = getattr(self.job.base, "made_up", False)
        return {
            **dict.fromkeys(KEPT), **common,
            "peft_type": "LORA", "inference_mode": True, "r": most, "lora_alpha": most, "lora_dropout": 0.0,
            "target_modules": [slot.module for slot in self.slots.values()],
            "modules_to_save": self.saved or None,
            "bias": "none" if not self.biases else "lora_only" if owned else "all",
            "fan_in_fan_out": any(c.get("fan_in_fan_out") for c in configs) if made_up else any(turned),
            "rank_pattern": other, "alpha_pattern": other, "use_rslora": False, "use_dora": False,
            "init_lora_weights": True,
        }  # fmt: skip


class _Maker:
    """Takes merged pieces and puts out an adapter's tensors; keeps what the rank left out."""

    def __init__(self, plan: Plan, target: torch.dtype, put: Callable[[str, Tensor], None]):
        self.plan, self.target, self.put_out = plan, target, put
        self.low: dict[str, Factors] = {}
        self.dense: dict[str, Tensor] = {}
        self.lost: dict[str, tuple[float, float]] = {}  # what is left out and all there is, both squared, by module
        self._guard = Lock()

    def put(self, name: str, piece: Piece) -> None:
        """Take a piece of a merged delta."""
        if isinstance(piece.value, Factors):
            self.low[name] = piece.value
        elif piece.value is not None:
            shape = shape_of(self.plan.job.base, name)
            if piece.value.numel() == math.prod(shape):  # whole, so no other piece comes
                self.dense[name] = piece.value.reshape(shape)
                return
            if name not in self.dense:
                self.dense[name] = torch.zeros(shape, dtype=piece.value.dtype)
            self.dense[name].reshape(-1)[piece.at : piece.at + piece.value.numel()] = piece.value.reshape(-1)

    def done(self, name: str) -> None:
        """Put out what a whole tensor has become."""
        low, dense = self.low.pop(name, None), self.dense.pop(name, None)
        if name in self.plan.full:
            origin = self.plan.job.base[name]
            merged = low.product(tuple(origin.shape)) if low is not None else dense
            return self.put_out(self.plan.full[name], origin if merged is None else applied(origin, merged))
        slot = self.plan.slots.get(name)
        if slot is None:
            return None
        if low is None:
            low = Factors.zero(slot.shape, torch.float32) if dense is None else None
        made, left, all_of_it = shortened(dense if low is None else low, slot.rank, exact=self.plan.rank == "exact")
        with self._guard:
            self.lost[slot.module] = left, all_of_it
        for key, tensor in zip(slot.names(), slot.stored(made), strict=True):
            self.put_out(key, tensor.to(self.target))

    def told(self) -> dict[str, Any]:
        """Return what the card says: the rank, and the relative error of each module and of all together."""
        errors = {module: _share(*self.lost[module]) for module in sorted(self.lost)}
        worst = max(errors, key=lambda module: errors[module])
        whole = _share(sum(left for left, _ in self.lost.values()), sum(total for _, total in self.lost.values()))
        some = {"all": whole, "median": statistics.median(errors.values()), "worst": [worst, errors[worst]]}
        rank = self.plan.width
        return {"rank": rank, "modules": len(errors), "error": some, "errors": errors}


def shortened(value: Any, rank: int, *, exact: bool = False) -> tuple[Factors, float, float]:
    """Return the best product of a rank, and the squared norms of what it leaves out and of the whole.

    ``value`` is a matrix, a tensor as one ([out, rest]) or `Factors`, which are decomposed without their product. With
    ``exact`` factors stay as they are. Both sides get the square root of the singular values.
    """
    if isinstance(value, Factors):
        if exact:
            return value, 0.0, float(((value.left.mT @ value.left) * (value.right @ value.right.mT)).sum())
        one, two = torch.linalg.qr(value.left.double()), torch.linalg.qr(value.right.mT.double())
        u, s, vt = torch.linalg.svd(one.R @ two.R.mT, full_matrices=False)
        root = s[:rank].sqrt()
        made = Factors(one.Q @ (u[:, :rank] * root), (two.Q @ (vt[:rank].mT * root)).mT)
        return made, float(s[rank:].square().sum()), float(s.square().sum())
    matrix = value.flatten(1)
    total = float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())
    if total == 0:
        return Factors.zero(tuple(matrix.shape), matrix.dtype), 0.0, 0.0
    u, s, v = leading(matrix, rank)
    kept = float(s.square().sum())
    left = total - kept if len(s) == rank < min(matrix.shape) else 0.0
    if 0 != left < ROUNDING * total:  # too small to be told from a difference
        left = float(torch.linalg.vector_norm(matrix.double() - u * s @ v.mT)) ** 2
    return Factors(u * s.sqrt(), (v * s.sqrt()).mT), left, total


def _share(left: float, total: float) -> float:
    return math.sqrt(left / total) if total > 0 else 0.0


def in_memory(plan: Plan, target: torch.dtype, progress: Progress = silent) -> dict[str, Tensor]:
    """Return the adapter's tensors by their names in the file."""
    made: dict[str, Tensor] = {}
    maker = _Maker(plan, target, made.__setitem__)
    _merge(plan, plan.job, maker, progress)
    return {name: made[name] for name in spec_for(plan, target)}


def streamed(
    plan: Plan, folder: Path, card: dict[str, Any], target: torch.dtype, key: str, progress: Progress = silent
) -> Adapter:
    """Write the adapter into ``folder``: weights, config, card and model card. All or nothing."""
    from .merge import hashes

    started = time.monotonic()
    sink = Sink(folder, spec_for(plan, target), metadata=short(card), single=FILES[0], key=None)
    seen = Seen()
    maker = _Maker(plan, target, sink.put)
    try:
        job = replace(plan.job, seen=seen.piece)
        _merge(plan, job, maker, progress)
        config = plan.config()
        told = {**card, **inputs_of([hashes([job], seen)]), "adapter": maker.told(), "job": key}
        told |= {"key": key_of(told), "seconds": round(time.monotonic() - started, 3)}
        if config["base_model_name_or_path"]:
            told = {"base": config["base_model_name_or_path"], **told}
        with sink.told():
            (sink.staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            write_card(sink.staging, told)
            write_readme(sink.staging, told)
    except BaseException:
        sink.abandon()
        raise
    sink.close()
    return Adapter(folder)


def _merge(plan: Plan, job: Job, maker: _Maker, progress: Progress) -> None:
    job = replace(job, factored=True)
    wanted = [name for name in job.names if name in plan.slots or name in plan.full]
    merge_each(job, survey(job, progress=progress), maker.put, only=wanted, done=maker.done, progress=progress)
    for name in plan.full:
        if name not in job.names:  # not floating point, or left out: the base's
            maker.done(name)


def spec_for(plan: Plan, target: torch.dtype) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of the file; the factors are of dtype ``target``."""
    lora = {key for slot in plan.slots.values() for key in slot.names()}
    return {key: (DTYPES[target] if key in lora else kind, shape) for key, (kind, shape) in plan.spec.items()}
