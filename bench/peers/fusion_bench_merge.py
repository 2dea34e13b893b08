"""One merge with FusionBench in Python, run by its own environment: load, merge, save.

    PEERS/fusion_bench/bin/python bench/peers/fusion_bench_merge.py tsv OUT BASE EXPERT...
    PEERS/fusion_bench/bin/python bench/peers/fusion_bench_merge.py '{"method": "tsv"}' OUT BASE EXPERT...

A method is a name, or JSON with its name and knobs. KnOTS is only a helper in FusionBench (the stacked SVD): `knots` runs
it on every matrix of the task vectors, averages the aligned parts and multiplies back; `knots_ties` gives the aligned
parts to FusionBench's own TIES.
"""

import json
import sys
from pathlib import Path

import torch
from fusion_bench import BaseModelPool

FACTOR = 0.4
CLASSES = {"CLIPVisionModel": "CLIPVisionModel", "LlamaForCausalLM": "AutoModelForCausalLM", "BertModel": "BertModel"}


def pool(base, experts):
    kind = json.loads((Path(base) / "config.json").read_text())["architectures"][0]
    load = {"_target_": f"transformers.{CLASSES[kind]}.from_pretrained"}
    models = {"_pretrained_": {**load, "pretrained_model_name_or_path": base}}
    models |= {f"e{k}": {**load, "pretrained_model_name_or_path": path} for k, path in enumerate(experts, 1)}
    return BaseModelPool(models)


def vectors(models):
    """Return the base and every expert's task vector."""
    base = models.load_pretrained_model()
    origin = base.state_dict()
    found = []
    for name in models.model_names:
        state = models.load_model(name).state_dict()
        found.append({key: state[key] - origin[key] for key in origin})
    return base, found


@torch.no_grad()
def knots(models):
    from fusion_bench.method.knots.knots_utils import subspace_alignment

    base, found = vectors(models)
    origin = base.state_dict()
    for key in origin:
        deltas = [vector[key] for vector in found]
        if deltas[0].ndim == 2:
            u, s, parts = subspace_alignment(deltas)
            origin[key] += u @ (s[:, None] * (sum(parts) / len(parts)))
        else:
            origin[key] += sum(deltas) / len(deltas)
    return base


@torch.no_grad()
def knots_ties(models, density, merge_func, scaling_factor):
    """Run FusionBench's TIES on the parts that its KnOTS helper aligned; tensors that no expert moved are left out."""
    from fusion_bench.method.knots.knots_utils import subspace_alignment
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    base, found = vectors(models)
    origin, bases, parts = base.state_dict(), {}, {}
    for key in origin:
        deltas = [vector[key] for vector in found]
        if not any(delta.any() for delta in deltas):
            continue
        if deltas[0].ndim == 2:
            bases[key], s, aligned = subspace_alignment(deltas)
            deltas = [s[:, None] * part for part in aligned]
        parts[key] = torch.stack(deltas)
    flat = torch.cat([part.flatten(1) for part in parts.values()], dim=1)
    merged = scaling_factor * ties_merging(flat, reset_thresh=density, merge_func=merge_func)
    for (key, part), piece in zip(parts.items(), merged.split([p[0].numel() for p in parts.values()]), strict=True):
        piece = piece.reshape(part.shape[1:])
        origin[key] += bases[key] @ piece if key in bases else piece
    return base


def method(name, **knobs):
    """Return a FusionBench algorithm; knobs are its own."""
    from fusion_bench import method as methods

    if name == "average":
        return methods.SimpleAverageAlgorithm()
    if name == "task_arithmetic":
        return methods.TaskArithmeticAlgorithm(**{"scaling_factor": FACTOR, **knobs})
    if name == "iso_c":
        return methods.ISO_C_Merge(1.0)
    if name == "iso_cts":
        return methods.ISO_CTS_Merge(1.0, 0.8)
    named = {
        "tsv": methods.TaskSingularVectorMerging,
        "ties": methods.TiesMergingAlgorithm,
        "dare": methods.DareTaskArithmetic,
        "dare_ties": methods.DareTiesMerging,
        "magmax": methods.MagMaxAlgorithm,
        "model_stock": methods.ModelStock,
        "wudi": methods.WUDIMerging,
    }
    return named[name](**knobs)


def main(told, out, base, *experts):
    torch.manual_seed(0)
    knobs = json.loads(told) if told.startswith("{") else {"method": told}
    name = knobs.pop("method")
    models = pool(base, experts)
    if name in ("knots", "knots_ties"):
        merged = {"knots": knots, "knots_ties": knots_ties}[name](models, **knobs)
    else:
        merged = method(name, **knobs).run(models)
    merged.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
