"""One merge with FusionBench in Python, run by its own environment: load, merge, save.

    PEERS/fusion_bench/bin/python bench/peers/fusion_bench_merge.py tsv OUT BASE EXPERT...

KnOTS is only a helper in FusionBench (the stacked SVD): `knots` runs it on every matrix of the task vectors, averages
the aligned parts and multiplies back.
"""

import json
import sys
from pathlib import Path

import torch
from fusion_bench import BaseModelPool

FACTOR = 0.4


def pool(base, experts):
    kind = json.loads((Path(base) / "config.json").read_text())["architectures"][0]
    target = {"CLIPVisionModel": "CLIPVisionModel", "LlamaForCausalLM": "AutoModelForCausalLM"}[kind]
    load = {"_target_": f"transformers.{target}.from_pretrained"}
    models = {"_pretrained_": {**load, "pretrained_model_name_or_path": base}}
    models |= {f"e{k}": {**load, "pretrained_model_name_or_path": path} for k, path in enumerate(experts, 1)}
    return BaseModelPool(models)


def knots(models):
    from fusion_bench.method.knots.knots_utils import subspace_alignment

    base = models.load_pretrained_model()
    origin = base.state_dict()
    vectors = []
    for name in models.model_names:
        state = models.load_model(name).state_dict()
        vectors.append({key: state[key] - origin[key] for key in origin})
    with torch.no_grad():
        for key in origin:
            deltas = [vector[key] for vector in vectors]
            if deltas[0].ndim == 2:
                u, s, parts = subspace_alignment(deltas)
                origin[key] += u @ (s[:, None] * (sum(parts) / len(parts)))
            else:
                origin[key] += sum(deltas) / len(deltas)
    return base


def method(name):
    if name == "average":
        from fusion_bench.method import SimpleAverageAlgorithm

        return SimpleAverageAlgorithm()
    if name == "task_arithmetic":
        from fusion_bench.method import TaskArithmeticAlgorithm

        return TaskArithmeticAlgorithm(scaling_factor=FACTOR)
    if name == "tsv":
        from fusion_bench.method.task_singular_vector import TaskSingularVectorMerging

        return TaskSingularVectorMerging()
    from fusion_bench.method.isotropic_merging import ISO_C_Merge, ISO_CTS_Merge

    return ISO_C_Merge(1.0) if name == "iso_c" else ISO_CTS_Merge(1.0, 0.8)


def main(name, out, base, *experts):
    models = pool(base, experts)
    merged = knots(models) if name == "knots" else method(name).run(models)
    merged.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
