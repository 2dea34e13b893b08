"""A toy that is small and still shows interference: an MLP, four tasks in different directions, linear heads."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merganser.evaluate.run import Labelled
from merganser.models.heads import Head, class_mean_head

torch.set_num_threads(1)
WIDTH, INSIDE, OUT, CLASSES = 12, 24, 16, 4


@dataclass
class Toy:
    """Base, experts, heads, unlabeled inputs and labelled tasks over one small encoder."""

    encoder: nn.Module
    base: dict[str, Tensor]
    experts: dict[str, dict[str, Tensor]]
    heads: dict[str, Head]
    inputs: Tensor
    tasks: dict[str, Labelled]
    train: dict[str, Labelled]


def make_encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, INSIDE), nn.Tanh(), nn.LayerNorm(INSIDE), nn.Linear(INSIDE, OUT))


def make_task(k: int, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = torch.Generator().manual_seed(100 + k)
    centres = torch.randn(2 * CLASSES, WIDTH, generator=shape) * 1.2
    parts = torch.randint(0, 2 * CLASSES, (n,), generator=rng)
    return centres[parts] + torch.randn(n, WIDTH, generator=rng) * 0.7, parts % CLASSES


def tuned(encoder: nn.Module, base: dict[str, Tensor], head: Head, task: Labelled) -> dict[str, Tensor]:
    params = {name: tensor.clone().requires_grad_(True) for name, tensor in base.items()}
    optimiser = torch.optim.Adam(params.values(), lr=5e-3)
    for _ in range(150):
        logits = head(torch.func.functional_call(encoder, params, (task.inputs,)))
        optimiser.zero_grad()
        nn.functional.cross_entropy(logits, torch.from_numpy(task.labels)).backward()
        optimiser.step()
    return {name: tensor.detach() for name, tensor in params.items()}


@pytest.fixture(scope="session")
def toy() -> Toy:
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    encoder = make_encoder()
    base = {name: tensor.detach().clone() for name, tensor in encoder.state_dict().items()}
    train, tasks, heads, experts = {}, {}, {}, {}
    for k, name in enumerate(("north", "east", "south", "west")):
        x, y = make_task(k, 400, rng)
        train[name] = Labelled(x, y.numpy().astype(np.int64))
        x_test, y_test = make_task(k, 300, rng)
        tasks[name] = Labelled(x_test, y_test.numpy().astype(np.int64))
        with torch.no_grad():
            heads[name] = class_mean_head(encoder(x), y, CLASSES, scale=10.0)
        experts[name] = tuned(encoder, base, heads[name], train[name])
    inputs = torch.cat([make_task(k, 300, rng)[0] for k in range(4)])
    inputs = inputs[torch.randperm(len(inputs), generator=rng)]
    return Toy(encoder, base, experts, heads, inputs, tasks, train)
