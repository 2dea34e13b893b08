"""Encoders from folders of Hugging Face models, for text (BERT's family) and images (CLIP, ViT), all offline."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import DataError, HeadError, MissingExtra, WeightsError, did_you_mean
from ..weights.open import Weights, open_weights, shape_of
from .device import device
from .encoder import features
from .heads import Head, prompted_head
from .inputs import Images, Texts
from .pixels import read_pixels
from .split import classifier_pooling, read_config

TEXT_POOLINGS = ("mean", "cls", "pooler")
IMAGE_POOLINGS = ("cls", "mean", "pooler")
CLIP_NORM = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Wrapped(nn.Module):
    """A transformers model whose parameters are also reachable under the names of its checkpoint, below ``stored.``.

    The two differ by more than a prefix (transformers 5 renames ViT's layers on loading), so ``stored`` is a second
    tree over the same parameters. ``roots`` are the prefixes that checkpoints of this architecture have or lack.
    """

    prefix = "stored."

    def __init__(self, model: nn.Module, names: dict[str, str], roots: Sequence[str]):
        super().__init__()
        self.stored = nn.Module()  # before `model`: a shared parameter goes by the name it was first seen under
        for stored, name in names.items():
            _plant(self.stored, stored, model.get_parameter(name))
        self.model = model
        self.roots = roots


class TextEncoder(Wrapped):
    """A text encoder: ``{"input_ids", "attention_mask"}`` ``[batch, length]`` to features ``[batch, width]``.

    ``pooling``: "mean" over the tokens under the mask, "cls" (the first token) or "pooler" (BERT's).
    """

    def __init__(
        self, model: nn.Module, names: dict[str, str], roots: Sequence[str], tokenizer: Any, pooling: str, length: int
    ):
        super().__init__(model, names, roots)
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.length = length

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, "batch width"]:
        out = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        if self.pooling == "pooler":
            return out.pooler_output
        if self.pooling == "cls":
            return out.last_hidden_state[:, 0]
        mask = batch["attention_mask"][..., None].float()
        return (out.last_hidden_state.float() * mask).sum(1) / mask.sum(1).clamp(min=1)

    def prepare(self, texts: Sequence[str]) -> Texts:
        """Return the tokenised ``texts``, cut to `length` tokens, unpadded. Raises DataError if one is no string."""
        texts = list(texts)
        for k, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {k} is a {type(text).__name__}, not a string")
        pad = self.tokenizer.pad_token_id or 0
        if not texts:
            return Texts([], pad)
        ids = self.tokenizer(texts, truncation=True, max_length=self.length, return_attention_mask=False)["input_ids"]
        return Texts([torch.tensor(i) for i in ids], pad)

    def prompts(self, texts: Sequence[str]) -> Float[Tensor, "n width"]:
        """Return the base's features of ``texts``."""
        return features(self, {}, self.prepare(texts), kind="fp32")


class ImageEncoder(Wrapped):
    """An image encoder: pixels ``[batch, channels, height, width]`` to features ``[batch, width]``.

    ``pooling``: "projection" (CLIP's image embedding), "cls" (the class token after the last layer norm), "mean" over
    the patches, or "pooler" (ViT's). ``logit_scale``: CLIP's, where the folder has one.
    """

    def __init__(self, model: nn.Module, names: dict[str, str], roots: Sequence[str], folder: Path, pooling: str):
        super().__init__(model, names, roots)
        config: Any = model.config
        self.folder = folder
        self.pooling = pooling
        self.clip = config.model_type.startswith("clip")
        if self.clip and (scale := clip_scale(folder)) is not None:
            self.logit_scale = scale
        mean, std = CLIP_NORM if self.clip else ((0.5,) * 3, (0.5,) * 3)
        self.pixels = read_pixels(folder, size=config.image_size, channels=config.num_channels, mean=mean, std=std)

    def forward(self, batch: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch width"]:
        out = self.model(pixel_values=batch)
        if self.pooling == "projection":
            return out.image_embeds
        if self.pooling == "mean":
            return out.last_hidden_state[:, 1:].float().mean(dim=1)
        # CLIP norms the class token alone, and calls that its pooler.
        return out.pooler_output if self.clip or self.pooling == "pooler" else out.last_hidden_state[:, 0]

    def prepare(self, images: Any) -> Images:
        """Return inputs from uint8 ``[n, height, width, channels]`` or a list of PIL images, as the processor would."""
        return self.pixels(images)

    def prompts(self, texts: Sequence[str]) -> Float[Tensor, "n width"]:
        """Return the embeddings of ``texts`` by CLIP's text tower. Raises HeadError if this encoder has none."""
        return clip_prompts(self.folder, texts)


def text_encoder(folder: str | Path, *, pooling: str = "mean", length: int = 64) -> TextEncoder:
    """Return the text encoder in ``folder`` (BERT, RoBERTa, DistilBERT, DeBERTa, ELECTRA, MPNet, MiniLM...).

    ``pooling`` "auto" is what the folder says: the token its classifier reads, or what sentence-transformers pools, or
    the mean. Texts are cut to ``length`` tokens, never more than the model reads.
    Raises WeightsError if the folder is no such model or lacks a tensor, HeadError if it cannot pool that way.
    """
    transformers = _transformers("text_encoder")
    folder, says = Path(folder), read_config(folder)
    pooling = _auto_text(folder, says) if pooling == "auto" else _known(pooling, TEXT_POOLINGS)
    if length < 1:
        raise DataError(f"length must be at least 1, got {length}")
    with _loading(folder, transformers):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, names = _load(_auto(transformers, config), config, open_weights(folder), folder, pooling == "pooler")
    _reads(model, "input_ids", folder)
    # RoBERTa's kin count positions from behind the padding token's.
    skipped = getattr(model.embeddings, "padding_idx", None)
    places = getattr(config, "max_position_embeddings", None) or length
    limits = [length, tokenizer.model_max_length, places if skipped is None else places - skipped - 1]
    return TextEncoder(model, names, [f"{model.base_model_prefix}."], tokenizer, pooling, min(limits))


def image_encoder(folder: str | Path, *, pooling: str = "auto") -> ImageEncoder:
    """Return the image encoder in ``folder``: CLIP's vision tower, whole CLIP or alone, or a ViT.

    ``pooling`` "auto" is "projection" for CLIP and "cls" for a ViT.
    Raises WeightsError if the folder is no such model or lacks a tensor, HeadError if it cannot pool that way.
    """
    transformers = _transformers("image_encoder")
    folder, says = Path(folder), read_config(folder)
    clip = says.get("model_type", "") in ("clip", "clip_vision_model")
    bare = clip and says.get("architectures") in (["CLIPForImageClassification"], ["CLIPVisionModel"])
    if pooling == "auto":
        pooling = "cls" if not clip else classifier_pooling(says) or "cls" if bare else "projection"
    allowed = ("projection", "cls", "mean") if clip else IMAGE_POOLINGS
    pooling = _known(pooling, allowed)
    with _loading(folder, transformers):
        if clip:
            config = _clip_part(transformers, folder, "vision")
            kind = "CLIPVisionModelWithProjection" if pooling == "projection" else "CLIPVisionModel"
            built = _load(getattr(transformers, kind), config, open_weights(folder), folder, True)
        else:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            built = _load(_auto(transformers, config), config, open_weights(folder), folder, pooling == "pooler")
    model, names = built
    _reads(model, "pixel_values", folder)
    roots = ["vision_model."] if clip else [f"{model.base_model_prefix}."]
    return ImageEncoder(model, names, roots, folder, pooling)


def clip_zero_shot_head(folder: str | Path, classes: Sequence[str], templates: str | Sequence[str]) -> Head:
    """Return CLIP's zero-shot head for the phrases ``classes`` put at the ``{}`` of each of ``templates``.

    Raises HeadError if the folder has no text tower. Source: CLIP (arXiv 2103.00020, section 3.1.4).
    """
    return prompted_head(lambda texts: clip_prompts(folder, texts), classes, templates, scale=clip_scale(folder) or 100)


@torch.no_grad()
def clip_prompts(folder: str | Path, texts: Sequence[str]) -> Float[Tensor, "n width"]:
    """Return the projected embeddings of ``texts`` by the text tower of the CLIP model in ``folder``."""
    transformers = _transformers("clip_prompts")
    folder = Path(folder)
    if (kind := read_config(folder).get("model_type")) != "clip":
        raise HeadError(
            f"{folder} is a '{kind}' without a text tower: zero-shot heads need the folder of a whole CLIP model"
        )
    with _loading(folder, transformers):
        config = _clip_part(transformers, folder, "text")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, _ = _load(transformers.CLIPTextModelWithProjection, config, open_weights(folder), folder, True)
    length = min(config.max_position_embeddings, tokenizer.model_max_length)
    rows = []
    for start in range(0, len(texts), 256):
        part = list(texts[start : start + 256])
        batch = tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt")
        rows.append(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).text_embeds.float())
    return torch.cat(rows)


def clip_scale(folder: str | Path) -> float | None:
    """Return CLIP's logit scale, ``exp(logit_scale)``, or None if the checkpoint has none."""
    weights = open_weights(folder)
    return weights["logit_scale"].float().exp().item() if "logit_scale" in weights else None


def _load(kind: Any, config: Any, weights: Weights, folder: Path, pooler: bool) -> tuple[Any, dict[str, str]]:
    """Return the model and ``{checkpoint name: parameter name}``.

    Which tensor goes where is asked of transformers itself, whatever it renames on loading: it is given a checkpoint
    whose k-th tensor is filled with k, and the number found in a parameter is the tensor it came from.
    """
    shapes = {name: shape_of(weights, name) for name in weights}
    marks = {n: torch.tensor(float(k)).expand(shape) for k, (n, shape) in enumerate(shapes.items()) if shape}
    model, info = kind.from_pretrained(
        None, config=config, state_dict=marks, dtype=torch.float32, output_loading_info=True
    )
    # A pooler that is not read would only be a parameter without a gradient.
    if not pooler and getattr(model, "pooler", None) is not None:
        model.pooler = None
    order, names, lacks = list(shapes), {}, []
    for name, parameter in model.named_parameters():
        if name in info["missing_keys"]:
            lacks.append(name)
            continue
        low, high = int(parameter.min()), int(parameter.max())
        if low != high:
            raise WeightsError(
                f"{folder}: transformers builds '{name}' from several tensors; such a model is not supported"
            )
        names[order[low]] = name
        parameter.data = weights[order[low]].float().clone()
    if lacks and all(n.startswith("pooler.") for n in lacks):
        raise HeadError(f"{folder}: this checkpoint has no pooler: use pooling='cls' or 'mean'")
    if lacks:
        raise WeightsError(
            f"{folder}: the checkpoint lacks '{lacks[0]}' ({len(lacks)} tensors) that its config.json asks for"
        )
    if device().type == "cpu":
        # On CPUs the fused kernel's backward pass takes half of a training step with short inputs (torch 2.13).
        model.set_attn_implementation("eager")
    return model.eval(), names


def _auto(transformers: Any, config: Any) -> Any:
    """Return the plain model's class for ``config``, as AutoModel would choose it."""
    try:
        return transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        raise ValueError(f"no plain model is known for a '{config.model_type}'") from None


def _clip_part(transformers: Any, folder: Path, tower: str) -> Any:
    """Return the configuration of one tower of the CLIP model in ``folder``."""
    kind = transformers.CLIPVisionConfig if tower == "vision" else transformers.CLIPTextConfig
    config = kind.from_pretrained(folder, local_files_only=True)
    config.projection_dim = read_config(folder).get("projection_dim", config.projection_dim)
    return config


def _auto_text(folder: Path, says: dict[str, Any]) -> str:
    if (modules := folder / "modules.json").is_file():
        for module in json.loads(modules.read_text(encoding="utf-8")):
            if module["type"].endswith("Pooling"):
                return _configured(folder / module["path"] / "config.json")
    if any(a.endswith("ForSequenceClassification") for a in says.get("architectures") or ()):
        return classifier_pooling(says) or "mean"
    return "mean"


def _configured(path: Path) -> str:
    """Return the pooling that a sentence-transformers folder asks for."""
    says = json.loads(path.read_text(encoding="utf-8"))
    modes = [k.removeprefix("pooling_mode_") for k, on in says.items() if k.startswith("pooling_mode_") and on is True]
    names = {"mean_tokens": "mean", "cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(modes := modes or [says.get("pooling_mode", "mean")]) != 1 or modes[0] not in names:
        raise HeadError(
            f"{path}: pooling {modes} is not supported; give pooling='mean' or 'cls', if that is near enough"
        )
    return names[modes[0]]


def _known(pooling: str, allowed: Sequence[str]) -> str:
    if pooling not in allowed:
        raise HeadError(
            f"pooling '{pooling}' is not known here{did_you_mean(pooling, allowed)}: use {', '.join(allowed)}"
        )
    return pooling


def _reads(model: Any, what: str, folder: Path) -> None:
    if model.main_input_name != what:
        raise WeightsError(f"{folder}: a '{model.config.model_type}' reads {model.main_input_name}, not {what}")


def _plant(tree: nn.Module, path: str, parameter: nn.Parameter) -> None:
    """Register ``parameter`` in ``tree`` under a dotted ``path``."""
    *folders, name = path.split(".")
    for folder in folders:
        if folder not in tree._modules:
            tree.add_module(folder, nn.Module())
        tree = tree._modules[folder]  # type: ignore[assignment]
    tree.register_parameter(name, parameter)


def _transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtra(what, "hf") from None
    return transformers


@contextmanager
def _loading(folder: Path, transformers: Any) -> Iterator[None]:
    """Keep transformers quiet, and report what it cannot load in one line."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(log.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as e:
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise WeightsError(f"{folder}: transformers cannot load it: {reason[0]}") from e
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
