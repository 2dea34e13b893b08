"""The text suite: one MiniLM encoder, an expert for every task of a folder, zero-shot heads, unlabeled sentences.

Experts are fine-tuned with the embeddings frozen. Datasets and licences: `docs/suites.md`.
"""

from functools import partial

from ..recipe import HeadsPart, LimitPart
from ..train import Plan
from . import suite
from .cache import cache_folder
from .minilm import write_minilm
from .suite import Suite, with_and_without

MERGERS = ("average", "task_arithmetic | scale(by=0.3)", "ties", "tsv", "iso_c")
SENTENCES = with_and_without(MERGERS)
PACKAGES = {"transformers": "bench", "all_minilm_l6_v2": "bench"}
SUITE = Suite(
    name="text",
    kind="text",
    network="MiniLM",
    base=lambda: write_minilm(cache_folder() / "minilm"),
    encoder="text",
    options={"pooling": "mean", "length": 64},
    heads=HeadsPart(kind="zero-shot", scale=20.0),
    plan=Plan(300, 1e-4, weight_decay=0.01),
    batch=32,
    scales=(0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0),
    sentences=SENTENCES,
    inputs=12_000,
    limits=LimitPart(val=200, test=800, diagnose=150),
    frozen=("embeddings.*",),
)
bench = partial(suite.bench, SUITE)
