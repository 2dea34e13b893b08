"""What adapting costs: a model with five constants, fitted on few tasks and checked on up to 20.

    python bench/ri_cost.py --out docs/results/ri-cost.json              a conv net on pictures
    python bench/ri_cost.py --encoder minilm --out ...                   MiniLM on sentences

CPU seconds of `merganser.adapt(how="ri(steps=S, batch=B)")` for N experts, of which A inputs are used (targets are asked for
once an input) and C classes stand in all heads together:

    T = (N + 1) A f  +  N S (B g + o + N p + C h)

    f    one input forward: the targets, by the base once and by each expert
    g    one input forward and backward through the student
    o    a step's own: optimiser, clipping
    p    a head, h a class of a head, forward and backward for a batch

The five are found by least squares (relative errors, none below zero) from runs of 2 to 6 tasks; runs of 8, 14 and 20 tasks
only check them. Experts are the base and noise: what a step costs does not depend on what it learns. The heads are as
large as those of the paper's 20 tasks.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from ri_step import CLASSES, minilm, moved

from merganser.adapt import adapt
from merganser.models.heads import Head
from merganser.models.toy import ConvNet

# the first of the 20 tasks, how many, steps, batch, inputs
FITTED = [(0, 2, 10, 16, 160), (0, 2, 10, 48, 480), (0, 2, 30, 16, 160), (0, 4, 10, 32, 1280), (2, 4, 20, 32, 320),
          (16, 4, 5, 64, 320), (6, 2, 20, 16, 320), (14, 6, 20, 16, 320), (2, 6, 10, 32, 320)]  # fmt: skip
CHECKED = [(0, 2, 60, 32, 960), (0, 8, 10, 32, 320), (0, 8, 20, 16, 1280), (0, 14, 10, 32, 320), (0, 20, 10, 32, 320),
           (0, 20, 20, 16, 640)]  # fmt: skip


def conv():
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    encoder = ConvNet().eval()
    weights = {n: t.detach() for n, t in encoder.state_dict().items()}
    pictures = torch.randn(2048, 1, 28, 28, generator=rng)
    with torch.no_grad():
        width = encoder(pictures[:1]).shape[1]
    return encoder, weights, pictures, width, 64


def heads_of(first: int, count: int, width: int) -> dict[str, Head]:
    rng = torch.Generator().manual_seed(2)
    return {
        n: Head(F.normalize(torch.randn(c, width, generator=rng), dim=1) * 20, None, True)
        for n, c in list(CLASSES.items())[first : first + count]
    }


def run(made, first: int, count: int, steps: int, batch: int, amount: int) -> float:
    """Return the CPU seconds of adapting ``count`` experts."""
    encoder, base, inputs, width, _ = made
    heads = heads_of(first, count, width)
    expert = moved(base, encoder)
    some = inputs[:amount] if isinstance(inputs, torch.Tensor) else type(inputs)(inputs.ids[:amount], inputs.pad)
    how = f"ri(steps={steps}, batch={batch}, held_out=0.0)"
    started = time.process_time()
    adapt(base, dict.fromkeys(heads, expert), encoder=encoder, heads=heads, inputs=some, how=how, kind="fp32")
    return time.process_time() - started


def terms(first: int, count: int, steps: int, batch: int, amount: int) -> list[float]:
    """Return what f, g, o, p and h are multiplied by."""
    used = min(amount, steps * batch)
    classes = sum(list(CLASSES.values())[first : first + count])
    return [(count + 1) * used, *(count * steps * by for by in (batch, 1, count, classes))]


def fitted(rows: list[tuple[list[float], float]]) -> np.ndarray:
    """Return non-negative constants of least relative error: the best of all subsets that are positive."""
    a = np.array([t for t, _ in rows]) / np.array([[s] for _, s in rows])
    best, least = np.zeros(a.shape[1]), np.inf
    for mask in range(1, 2 ** a.shape[1]):
        at = [k for k in range(a.shape[1]) if mask >> k & 1]
        x, *_ = np.linalg.lstsq(a[:, at], np.ones(len(a)), rcond=None)
        error = np.square(a[:, at] @ x - 1).sum()
        if (x >= 0).all() and error < least:
            best, least = np.zeros(a.shape[1]), error
            best[at] = x
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", choices=["conv", "minilm"], default="conv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    made = {"conv": conv, "minilm": minilm}[args.encoder]()
    run(made, 0, 2, 2, 16, 32)  # imports and first calls
    seconds = {case: float(np.median([run(made, *case) for _ in range(args.rounds)])) for case in FITTED + CHECKED}
    found = fitted([(terms(*case), seconds[case]) for case in FITTED])
    rows = []
    for case in FITTED + CHECKED:
        told = float(np.dot(terms(*case), found))
        used = "fitted" if case in FITTED else "checked"
        rows.append(
            [
                used,
                *map(str, case[1:]),
                str(sum(list(CLASSES.values())[case[0] : case[0] + case[1]])),
                f"{seconds[case]:.2f}",
                f"{told:.2f}",
                f"{told / seconds[case]:.2f}",
            ]
        )
        print(rows[-1], flush=True)
    units = dict(zip("fgoph", (f"{1e6 * v:.1f}" for v in found), strict=True))
    print("microseconds:", units)
    if args.out:
        head = ["used for", "tasks N", "steps S", "batch B", "inputs A", "classes C", "CPU s", "by the model", "ratio"]
        told = {"head": head, "rows": rows, "microseconds": units, "date": time.strftime("%Y-%m-%d")}
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
