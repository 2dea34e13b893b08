"""Pretrain the small conv net from scratch on drawn characters: a base of our own, where none can be downloaded."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..card import is_done, key_of
from ..models.device import home, placed, there
from ..models.encoder import forward
from ..models.toy import ConvNet
from ..progress import Progress, silent
from ..train import Checkpoint, Order, Plan, train
from ..weights.save import save
from .glyphs import glyphs

PLAN = Plan(560, 3e-3, weight_decay=0.05, clip=0.0)


def pretrain(
    folder: Path,
    characters: str,
    faces: Sequence[str],
    *,
    images: int = 12000,
    plan: Plan = PLAN,
    batch: int = 128,
    scale: float = 16.0,
    seed: int = 0,
    drawn: int = 0,
    told: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Path:
    """Train the net to tell ``characters`` apart, write it into ``folder`` unless its card proves it done; return that.

        loss = cross-entropy of scale cos(f(x), c_k),   c_k learned and thrown away

    ``drawn`` seeds the pictures, ``seed`` the net and the order. ``told``: more that the card says.
    """
    says: dict[str, Any] = {"kind": "base", "plan": asdict(plan), "batch": batch, "images": images, "seed": seed}
    says |= {"faces": tuple(faces), "characters": characters, **(told or {})}
    key = key_of(says)
    if is_done(folder, key):
        return folder
    pixels, labels = glyphs(characters, faces, images, drawn)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ConvNet()
        classes = torch.randn(len(characters), net.project.out_features)
    inputs, y = net.prepare(pixels), torch.from_numpy(labels)
    params = {name: there(tensor.detach().clone()) for name, tensor in placed(net).named_parameters()}

    def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        weights = {name: tensor for name, tensor in everything.items() if name != "classes"}
        x = forward(net, weights, inputs.take(at), "fp32")
        return F.cross_entropy(scale * x @ F.normalize(everything["classes"], dim=1).T, there(y[at])), {}

    everything = {**params, "classes": there(classes)}
    checkpoint = Checkpoint(folder / "checkpoint.safetensors", key)
    with progress("pretrain the base", plan.steps) as tick:
        order = Order(len(y), min(batch, len(y)), seed)
        trained, _ = train(everything, loss, order, plan, checkpoint=checkpoint, tick=tick)
    checkpoint.path.unlink(missing_ok=True)
    save(home({name: trained[name] for name in params}), folder, {**says, "key": key})
    return folder
