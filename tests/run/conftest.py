"""A user's own models on disk: a small conv net in her own file, three image tasks, unlabeled images, a recipe."""

import textwrap

import numpy as np
import pytest
import torch
from torch import nn

import merganser
from merganser.models.inputs import Images

ENCODER = """
import torch
from torch import nn
from merganser import open_weights
from merganser.models.inputs import Images


class Net(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.out = nn.Linear(8 * 16, width)

    def forward(self, x):
        x = torch.nn.functional.avg_pool2d(torch.relu(self.norm(self.conv(x))), 2)
        return self.out(x.flatten(1))

    def prepare(self, raw):
        return Images(torch.from_numpy(raw).permute(0, 3, 1, 2).contiguous())


def build(base, width=12):
    net = Net(width)
    net.load_state_dict(dict(open_weights(base)))
    return net
"""

RECIPE = """
title = "three small tasks"
sentences = [
  "task_arithmetic | scale(by=1.0)",
  "ri(steps=40, lr=0.003, batch=32) | task_arithmetic | scale(by=1.0)",
  "average",
]
scales = [0.4, 0.8]

[model]
base = "base"
encoder = "./net.py:build"
precision = "fp32"

[experts]
stripes = "experts/stripes"
spots = "experts/spots"
corners = "experts/corners"

[tasks]
folder = "tasks"

[heads]
kind = "class-mean"

[inputs]
files = ["inputs.npz"]
"""


def images(task: int, n: int, seed: int):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    patterns = np.random.default_rng(50 + task).integers(0, 200, (3, 8, 8, 1))
    x = patterns[y] + rng.normal(0, 60, (n, 8, 8, 1))
    return np.clip(x, 0, 255).astype(np.uint8), y.astype(np.int64)


@pytest.fixture(scope="session")
def user(tmp_path_factory):
    """Return the folder that holds everything."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "net.py").write_text(ENCODER)
    (folder / "recipe.toml").write_text(RECIPE)
    space: dict = {}
    exec(compile(ENCODER, "net.py", "exec"), space)
    torch.manual_seed(0)
    net = space["Net"]()
    base = {n: t.detach().clone() for n, t in net.state_dict().items()}
    merganser.save(base, folder / "base")
    for k, name in enumerate(("stripes", "spots", "corners")):
        task = folder / "tasks" / name
        task.mkdir(parents=True)
        text = f'name = "{name}"\nkind = "image"\nclasses = ["one", "two", "three"]\nmetric = "accuracy"\n'
        (task / "task.toml").write_text(textwrap.dedent(text))
        for j, (split, n) in enumerate((("train", 150), ("val", 60), ("test", 120))):
            x, y = images(k, n, 10 * k + j)
            np.savez(task / f"{split}.npz", x=x, y=y)
        merganser.save(expert(net, base, *images(k, 150, 10 * k)), folder / "experts" / name)
    np.savez(folder / "inputs.npz", x=np.concatenate([images(k, 80, 90 + k)[0] for k in range(3)]))
    return folder


def expert(net, base, x, y):
    inputs = Images(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous())
    batch, labels = inputs.take(torch.arange(len(y))), torch.from_numpy(y)
    params = {n: t.clone().requires_grad_(True) for n, t in base.items()}
    with torch.no_grad():
        head = merganser.class_mean_head(torch.func.functional_call(net, base, (batch,)), labels, 3)
    optimiser = torch.optim.Adam(params.values(), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(head(torch.func.functional_call(net, params, (batch,))), labels)
        loss.backward()
        optimiser.step()
    return {n: t.detach() for n, t in params.items()}
