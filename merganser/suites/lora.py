"""The LoRA suite: the text suite's tasks, MiniLM, and an expert for every task that is a LoRA adapter, as PEFT writes it.

Merged as they are and, with `knots` and `core`, from their factors. Learning rate and modules: `docs/suites.md`.
"""

from functools import partial

from ..train import Plan
from . import suite, text
from .finetune import Lora
from .suite import shortened, with_and_without

PLAIN = ("task_arithmetic | scale(by=0.3)", "ties", "dare(keep=0.2) | ties", "tsv", "iso_c")
MERGERS = (*PLAIN, *(f"knots | {how}" for how in PLAIN), *(f"core | {how}" for how in ("ties", "tsv", "iso_c")))
SENTENCES = with_and_without(MERGERS, "ri(lr=0.0005)")
PACKAGES = text.PACKAGES
SUITE = shortened(
    text.SUITE,
    name="lora",
    plan=Plan(300, 1e-3, weight_decay=0.01),
    lora=Lora(rank=16, alpha=16, targets=("query", "key", "value", "attention.output.dense")),
    sentences=SENTENCES,
    frozen=(),
)
bench = partial(suite.bench, SUITE)
