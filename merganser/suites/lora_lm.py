"""The language suite with LoRA adapters: the same base and skills, an expert for each that is an adapter.

Merged as they are and, with `knots` and `core`, from their factors, as in the LoRA suite. Settings: `docs/suites.md`.
"""

from functools import partial

from ..train import Plan
from . import lm
from .finetune import Lora
from .gpt import PLAN
from .lora import SENTENCES

PACKAGES, NAMES = lm.PACKAGES, lm.NAMES
LORA = Lora(rank=16, alpha=16, targets=("c_attn", "c_proj", "c_fc"))
TUNE = Plan(400, 1e-3, weight_decay=0.01)
bench = partial(lm.bench, name="lora-lm", written=SENTENCES, lora=LORA, plans=(PLAN, TUNE))
