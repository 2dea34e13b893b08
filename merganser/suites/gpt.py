"""A small causal language model of our own, character by character: pretrained here, fine-tuned on one skill each.

Folders are as on the Hub (config.json, tokenizer.json, model.safetensors), so `transformers` loads them.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..card import is_done, key_of, read_card
from ..errors import MissingExtra
from ..models.causal import CausalLM, causal_lm, places
from ..models.device import home, placed, there
from ..models.encoder import forward
from ..models.inputs import Said, Texts
from ..progress import Progress
from ..steps.moving import Moving
from ..train import Checkpoint, Order, Plan, train
from ..weights.own_rank import save_adapter
from ..weights.save import save
from ..weights.stored import Stored
from .finetune import Lora
from .skills import Pairs, reading

END = "<end>"
CHARACTERS = "".join(map(chr, range(32, 127)))
SHAPE = {"n_embd": 160, "n_layer": 4, "n_head": 5, "n_positions": 128}
PLAN = Plan(2000, 2e-3, weight_decay=0.05)
TUNE = Plan(400, 3e-4, weight_decay=0.01)
BATCH = 64


def write_base(folder: Path, *, plan: Plan = PLAN, progress: Progress, seed: int = 0) -> Path:
    """Pretrain on `skills.reading`, write the model into ``folder`` unless it is there; return that."""
    says = {
        "kind": "base",
        "plan": asdict(plan),
        "batch": BATCH,
        "shape": SHAPE,
        "characters": CHARACTERS,
        "seed": seed,
        "texts": key_of(texts := reading(END, seed)),
    }
    key = key_of(says)
    if is_done(folder, key):
        return folder
    _skeleton(folder, seed)
    model = causal_lm(folder)
    start = {n: t.clone() for n, t in Stored(folder).items()}
    what = (model, start, Moving(start), model.tokens(texts), None)
    save(_trained(*what, plan, folder, key, "pretrain the base", progress, seed), folder, {**says, "key": key})
    return folder


def write_expert(
    folder: Path,
    base: Path,
    skill: str,
    pairs: Pairs,
    *,
    plan: Plan = TUNE,
    lora: Lora | None = None,
    progress: Progress,
    seed: int = 0,
) -> Path:
    """Fine-tune the base on one skill's pairs, the loss on the answers alone; return ``folder``, made once.

    With ``lora`` the expert is an adapter, as PEFT writes it; GPT-2's matrices lie [in, out].
    """
    card = {"kind": "expert", "plan": asdict(plan), "batch": BATCH, "skill": skill, "seed": seed}
    card |= {"base": (read_card(base) or {}).get("key"), "pairs": key_of(pairs)}
    card |= {} if lora is None else {"lora": asdict(lora)}
    key = key_of(card)
    if is_done(folder, key):
        return folder
    model = causal_lm(base)
    texts = model.tokens([prompt + answer + END for prompt, answer in pairs])
    skipped = torch.tensor([len(model.tokenizer(prompt)["input_ids"]) for prompt, _ in pairs])
    start = {n: t.clone() for n, t in Stored(base).items()}
    if lora is None:
        work = Moving(start)
    else:  # another A for every skill, as adapters that are trained apart have
        work = lora.work(start, list(start), start=int(key_of({"skill": skill})[:8], 16), turned=True)
    trained = _trained(model, start, work, texts, skipped, plan, folder, key, f"fine-tune {skill}", progress, seed)
    if lora is None:
        save(trained, folder, {**card, "key": key})
    else:
        config = lora.config(base.name, task="CAUSAL_LM", turned=True)
        save_adapter(lora.tensors(trained, turned=True), config, folder, {**card, "key": key})
    return folder


def _trained(
    model: CausalLM,
    start: Mapping[str, Tensor],
    work: Moving,
    texts: Texts | Said,
    skipped: Tensor | None,
    plan: Plan,
    folder: Path,
    key: str,
    said: str,
    progress: Progress,
    seed: int,
) -> dict[str, Tensor]:
    """Return the parameters of ``work``, trained to predict every next token behind the first ``skipped`` of each text."""
    placed(model)
    fixed = {model.prefix + name: there(tensor.detach().float()) for name, tensor in start.items()}
    before = torch.zeros(len(texts), dtype=torch.int64) if skipped is None else skipped

    def loss(at: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        batch = there(texts.take(at))
        weights = fixed | {model.prefix + n: t for n, t in work.weights(work.params).items()}
        logits = forward(model, weights, batch)
        mask = batch["attention_mask"]
        wanted = places(batch["input_ids"][..., None].roll(-1, 1), mask)[:, 0]
        each = F.cross_entropy(places(logits, mask), wanted, reduction="none")
        counts = places(there((torch.arange(mask.shape[1])[None, :] >= before[at][:, None] - 1)[..., None]), mask)[:, 0]
        return (each * counts).sum() / counts.sum(), {}

    checkpoint = Checkpoint(folder / "checkpoint.safetensors", key)
    with progress(said, plan.steps) as tick:
        order = Order(len(texts), min(BATCH, len(texts)), seed, texts.lengths)
        trained, _ = train(work.params, loss, order, plan, checkpoint=checkpoint, tick=tick)
    checkpoint.path.unlink(missing_ok=True)
    return home(trained)


def _skeleton(folder: Path, seed: int) -> None:
    """Write an untrained model with its configuration and tokenizer."""
    try:
        import transformers
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise MissingExtra("the language model suite", "hf") from None
    words = {"<pad>": 0, END: 1, **{c: k for k, c in enumerate(CHARACTERS, 2)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(f"{END}|."), "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token=END, model_max_length=SHAPE["n_positions"]
    )
    says: dict[str, Any] = {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 1, **SHAPE}
    config = transformers.GPT2Config(**says, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
