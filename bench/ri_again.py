"""What a second word on the same inputs costs, its targets being there: `ri` with another knob, and `coadapt` behind `ri`.

    python bench/ri_again.py [--steps 50] [--rounds 3]

CPU seconds of adapting experts of MiniLM on random texts with eight heads: the first word, the second with the targets of
the first, the second by itself, in turn in one process on one thread; ratios round by round, their medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from ri_step import CLASSES, minilm, moved

from merganser.adapt import adapt
from merganser.models.heads import Head
from merganser.models.inputs import Texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    encoder, base, _, width, _ = minilm()
    rng = torch.Generator().manual_seed(2)
    texts = Texts([torch.randint(1000, 20000, (24,), generator=rng) for _ in range(12_000)])
    heads = {
        name: Head(F.normalize(torch.randn(count, width, generator=rng), dim=1) * 20, None, True)
        for name, count in list(CLASSES.items())[:8]
    }
    experts = {name: moved(base, encoder) for name in list(heads)[: asked.experts]}

    def seconds(how: str, targets: Path) -> float:
        started = time.process_time()
        with tempfile.TemporaryDirectory() as into:
            adapt(
                base, experts, encoder=encoder, heads=heads, inputs=texts, how=how, into=Path(into), kind="bf16",
                _targets=targets,
            )  # fmt: skip
        return time.process_time() - started

    first = f"ri(steps={asked.steps})"
    for again in (f"ri(steps={asked.steps}, alpha=3.0)", f"coadapt(steps={asked.steps})"):
        shared, alone = [], []
        for _ in range(asked.rounds):
            with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
                seconds(first, Path(one))
                shared.append(seconds(again, Path(one)))
                alone.append(seconds(again, Path(other)))
        ratios = [a / b for a, b in zip(shared, alone, strict=True)]
        print(
            f"{again} behind {first}, {asked.experts} experts: {statistics.median(shared):.1f} of "
            f"{statistics.median(alone):.1f} CPU seconds, {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}, {asked.rounds} rounds)",
            flush=True,
        )


if __name__ == "__main__":
    main()
