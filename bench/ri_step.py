"""One RI step against the naive one (three forward passes, a loop over heads) and against a supervised step.

    python bench/ri_step.py                     both encoders, 8 and 20 heads; prints ratios of medians
    python bench/ri_step.py --json out.json
    python bench/ri_step.py --blocks 1 2 4 --encoder minilm     the last blocks alone, against a step of all
    python bench/ri_step.py --micro 8 --encoder minilm       a batch in parts: CPU seconds and peak memory of one at once

The three run in turn in one process, a few steps each, for several rounds; the ratio is taken round by round, so it
holds when the machine's speed drifts. Same encoder, batch, precision, optimiser and clipping for all three. Computing
the targets once, before the first step, is not part of a step; its seconds are printed beside.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from merganser.evaluate.run import Labelled
from merganser.models.encoder import bound, precision
from merganser.models.heads import Head
from merganser.models.inputs import Texts, take
from merganser.steps.adapt.ri import ri
from merganser.steps.student import Student
from merganser.suites.cache import cache_folder
from merganser.suites.finetune import finetune
from merganser.train import Order, Plan

CLASSES = {  # of the paper's 20 tasks, in its order; the first 8 are the usual ones
    "cars": 196, "dtd": 47, "eurosat": 10, "gtsrb": 43, "mnist": 10, "resisc45": 45, "svhn": 10, "sun397": 397,
    "stl10": 10, "pets": 37, "flowers": 102, "cifar100": 100, "pcam": 2, "fer2013": 7,
    "cifar10": 10, "food101": 101, "fashion": 10, "sst2": 2, "emnist": 10, "kmnist": 10,
}  # fmt: skip


def minilm():
    from merganser.models.open import open_encoder
    from merganser.suites.minilm import write_minilm
    from merganser.weights.stored import Stored

    folder = write_minilm(cache_folder() / "minilm")
    encoder = open_encoder("text", folder)
    rng = torch.Generator().manual_seed(0)
    texts = Texts([torch.randint(1000, 20000, (24,), generator=rng) for _ in range(512)])
    return encoder, dict(Stored(folder)), texts, 384, 32


def clip():
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, patch_size=32,
        image_size=224, projection_dim=512,
    )  # fmt: skip

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = transformers.CLIPVisionModelWithProjection(config)

        def forward(self, pixels):
            return self.model(pixel_values=pixels).image_embeds

    encoder = Vision().eval()
    weights = {n: t.detach() for n, t in encoder.state_dict().items()}
    return encoder, weights, torch.randn(128, 3, 224, 224, generator=torch.Generator().manual_seed(0)), 512, 16


def moved(weights, encoder):
    known = bound(encoder, weights)
    prefix = getattr(encoder, "prefix", "")
    frozen = lambda n: not weights[n].is_floating_point() or n.startswith("embeddings.") or prefix + n not in known  # noqa: E731
    rng = torch.Generator().manual_seed(1)
    return {n: t if frozen(n) else t + 1e-3 * torch.randn(t.shape, generator=rng) for n, t in weights.items()}


def ours(encoder, base, expert, heads, inputs, batch, steps, blocks=0, micro=0):
    times = []
    tick = lambda advance=1, **_: times.append(time.perf_counter()) if advance else None  # noqa: E731
    started = time.perf_counter()
    ri(expert, base, heads, inputs, own=next(iter(heads)), encoder=encoder, steps=steps + 1, lr=1e-5, batch=batch,
       held_out=0.0, blocks=blocks, micro=micro, _precision="bf16", _tick=tick)  # fmt: skip
    return [b - a for a, b in pairwise(times)], times[0] - started


def naive(encoder, base, expert, heads, inputs, batch, steps):
    own = next(iter(heads))
    prefix = getattr(encoder, "prefix", "")
    fixed = {name: bound(encoder, w) for name, w in (("base", base), ("expert", expert))}
    trained = {n: expert[n].clone().requires_grad_(True) for n in expert if not torch.equal(expert[n], base[n])}
    optimiser = torch.optim.AdamW(list(trained.values()), lr=1e-5, weight_decay=1e-4, fused=True)
    order = Order(len(inputs), batch, 0, getattr(inputs, "lengths", None))
    seconds = []
    for step in range(steps + 1):
        started = time.perf_counter()
        x = take(inputs, order(step))
        with torch.no_grad(), precision("bf16"):
            f_base = torch.func.functional_call(encoder, fixed["base"], (x,)).float()
            f_expert = torch.func.functional_call(encoder, fixed["expert"], (x,)).float()
        with precision("bf16"):
            weights = fixed["expert"] | {prefix + n: t for n, t in trained.items()}
            f_student = torch.func.functional_call(encoder, weights, (x,)).float()
        loss = 0.0
        for name, head in heads.items():
            with torch.no_grad():
                target = head(f_expert if name == own else f_base).softmax(1)
            kl = F.kl_div(head(f_student).log_softmax(1), target, reduction="batchmean")
            loss = loss + (kl if name == own else kl / (len(heads) - 1))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimiser.step()
        seconds.append(time.perf_counter() - started)
    return seconds[1:], 0.0


def supervised(encoder, base, expert, heads, inputs, batch, steps):
    head = next(iter(heads.values()))
    labels = np.arange(len(inputs)) % len(head.weight)
    times = []
    tick = lambda advance=1, **_: times.append(time.perf_counter()) if advance else None  # noqa: E731
    frozen = [n for n in base if torch.equal(base[n], expert[n])]
    finetune(expert, encoder, head, Labelled(inputs, labels), Plan(steps + 1, 1e-5, 1e-4), batch=batch, frozen=frozen,
             kind="bf16", tick=tick)  # fmt: skip
    return [b - a for a, b in pairwise(times)], 0.0


def measure(name, heads_wanted, rounds, steps):
    encoder, base, inputs, width, batch = {"minilm": minilm, "vit-b-32": clip}[name]()
    expert = moved(base, encoder)
    rng = torch.Generator().manual_seed(2)
    found = []
    for count in heads_wanted:
        heads = {
            n: Head(F.normalize(torch.randn(c, width, generator=rng), dim=1) * 20, None, True)
            for n, c in list(CLASSES.items())[:count]
        }
        rows = {"ours": [], "naive": [], "supervised": []}
        targets = 0.0
        for _ in range(rounds):
            for way in (ours, naive, supervised):
                seconds, before = way(encoder, base, expert, heads, inputs, batch, steps)
                rows[way.__name__].append(statistics.median(seconds))
                targets = max(targets, before)
        ratio = {
            other: [a / b for a, b in zip(rows["ours"], rows[other], strict=True)] for other in ("naive", "supervised")
        }
        found.append(
            {
                "encoder": name, "heads": count, "batch": batch, "threads": torch.get_num_threads(), "rounds": rounds,
                "steps": steps, "seconds": {k: statistics.median(v) for k, v in rows.items()},
                "targets_once": targets,
                "ratio": {k: {"median": statistics.median(v), "min": min(v), "max": max(v)} for k, v in ratio.items()},
            }
        )  # fmt: skip
        r = found[-1]["ratio"]
        print(
            f"{name:9} {count:2} heads, batch {batch}: one RI step {found[-1]['seconds']['ours'] * 1000:.0f} ms; "
            f"to the naive step {r['naive']['median']:.2f} ({r['naive']['min']:.2f}-{r['naive']['max']:.2f}), "
            f"to a supervised step {r['supervised']['median']:.2f} "
            f"({r['supervised']['min']:.2f}-{r['supervised']['max']:.2f})"
        )
    return found


def in_part(name, counts, rounds, steps):
    """Compare a step that trains the last blocks alone, what is below them run once or at every step, with one of all."""
    encoder, base, inputs, width, batch = {"minilm": minilm, "vit-b-32": clip}[name]()
    expert = moved(base, encoder)
    rng = torch.Generator().manual_seed(2)
    heads = {
        n: Head(F.normalize(torch.randn(c, width, generator=rng), dim=1) * 20, None, True)
        for n, c in list(CLASSES.items())[:8]
    }
    ways = {"all": 0, **{f"{kept}, {k}": k for k in counts for kept in ("once", "every step")}}
    rows = {way: [] for way in ways}
    skips = Student.remember_lower
    for _ in range(rounds):
        for way, blocks in ways.items():
            Student.remember_lower = skips if way.startswith("once") else lambda *_: None
            rows[way].append(statistics.median(ours(encoder, base, expert, heads, inputs, batch, steps, blocks)[0]))
    Student.remember_lower = skips
    found = []
    for way in list(ways)[1:]:
        ratios = [a / b for a, b in zip(rows[way], rows["all"], strict=True)]
        told = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        found.append({"encoder": name, "way": way, "batch": batch, "threads": torch.get_num_threads(), "ratio": told})
        print(f"{name:9} {way:14}: {told['median']:.2f} ({told['min']:.2f}-{told['max']:.2f}) of a step of all blocks")
    return found


def in_parts(name, sizes, rounds, steps):
    """Compare steps whose batch is taken in parts with whole ones, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    rows = {size: [] for size in (0, *sizes)}
    for _ in range(rounds):
        for size in rows:
            with context.Pool(1) as pool:
                rows[size].append(pool.apply(_parts, (name, size, steps)))
    found = []
    for size in sizes:
        told = {"encoder": name, "micro": size, "rounds": rounds}
        for k, what in enumerate(("cpu", "peak MiB over the start")):
            ratios = [a[k] / b[k] for a, b in zip(rows[size], rows[0], strict=True)]
            told[what] = {"ours": statistics.median(r[k] for r in rows[size]), "ratio": statistics.median(ratios)}
        found.append(told)
        print(told)
    return found


def _parts(name, micro, steps):
    torch.set_num_threads(1)
    encoder, base, inputs, width, batch = {"minilm": minilm, "vit-b-32": clip}[name]()
    rng = torch.Generator().manual_seed(2)
    heads = {n: Head(F.normalize(torch.randn(c, width, generator=rng), dim=1) * 20, None, True) for n, c in
             list(CLASSES.items())[:8]}  # fmt: skip
    expert = moved(base, encoder)
    before = resource.getrusage(resource.RUSAGE_SELF)
    ours(encoder, base, expert, heads, inputs, batch, steps, micro=micro)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime - before.ru_utime, (after.ru_maxrss - before.ru_maxrss) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", action="append", choices=["minilm", "vit-b-32"])
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 20])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--blocks", type=int, nargs="+", help="instead: the last so many blocks alone")
    parser.add_argument("--micro", type=int, nargs="+", help="instead: a batch in parts of so many inputs")
    parser.add_argument("--json")
    told = parser.parse_args()
    found = []
    for name in told.encoder or ["minilm", "vit-b-32"]:
        if told.micro:
            found += in_parts(name, told.micro, told.rounds, told.steps)
            continue
        found += (
            in_part(name, told.blocks, told.rounds, told.steps)
            if told.blocks
            else measure(name, told.heads, told.rounds, told.steps)
        )
    if told.json:
        with open(told.json, "w") as file:  # noqa: PTH123
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
