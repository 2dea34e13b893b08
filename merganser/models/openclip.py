"""CLIP's vision tower under the names that open_clip gives its tensors (``visual.transformer.resblocks.0...``).

Most published CLIP experts are saved that way, with q, k and v in one ``in_proj`` matrix: what a merger that works
matrix by matrix makes of them depends on it, so they are merged as they lie and taken apart only to be run.
"""

import re
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import WeightsError
from ..weights.open import open_weights
from .hf import ImageEncoder, _plant, clip_prompts, image_encoder
from .inputs import Images

ROOTS = ("image_encoder.model.", "model.", "image_encoder.")
TOP = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
FUSED = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
IN_BLOCK = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")


class OpenClip(nn.Module):
    """An image encoder with open_clip's tensors: pixels ``[batch, 3, height, width]`` to CLIP's image embedding."""

    prefix = "stored."
    roots = ROOTS

    def __init__(self, tower: ImageEncoder, places: Mapping[str, str], weights: Mapping[str, Tensor]):
        super().__init__()
        self.stored = nn.Module()
        for name, tensor in weights.items():
            _plant(self.stored, name, nn.Parameter(tensor))
        self.names = list(weights)
        self.tower = tower
        self.places = places
        if hasattr(tower, "logit_scale"):
            self.logit_scale = tower.logit_scale

    def forward(self, batch: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch width"]:
        held = {name: attrgetter(name)(self.stored) for name in self.names}  # whatever functional_call put there
        parts = {self.places[k]: v for n, t in held.items() for k, v in taken_apart(n, t).items()}
        return torch.func.functional_call(self.tower.model, parts, (), {"pixel_values": batch}).image_embeds

    def prepare(self, images: Any) -> Images:
        """Return inputs as CLIP's image processor would make them."""
        return self.tower.prepare(images)

    def prompts(self, texts: Any) -> Float[Tensor, "n width"]:
        """Return the embeddings of ``texts`` by the text tower of the Hugging Face folder."""
        return clip_prompts(self.tower.folder, texts)


def openclip_encoder(base: str | Path, *, clip: str | Path) -> OpenClip:
    """Return the encoder of the open_clip checkpoint ``base``.

    ``clip``: the folder of the same CLIP model from the Hugging Face Hub (its configuration, text tower and pictures'
    processor; experts never differ in them). Raises WeightsError where ``base`` is no such checkpoint.
    """
    held = open_weights(base)
    weights = {name: held[name].float() for name in held if "visual." in name}
    if "visual.proj" not in {plain(name) for name in weights}:
        raise WeightsError(f"{base}: no 'visual.proj': not an open_clip checkpoint of CLIP's vision tower")
    tower = image_encoder(clip, pooling="projection")
    places = {n: m.removeprefix("model.") for n, m in tower_names(tower).items()}
    parts = {k: v for name, tensor in weights.items() for k, v in taken_apart(name, tensor).items()}
    for name, place in places.items():
        want = tuple(tower.model.get_parameter(place).shape)
        if name not in parts or tuple(parts[name].shape) != want:
            has = f"is {list(parts[name].shape)}" if name in parts else "is missing"
            raise WeightsError(f"{base}: '{name}' {has}, {clip} needs {list(want)}: another size of CLIP?")
    return OpenClip(tower, places, weights)


def plain(name: str) -> str:
    """Return a tensor's name without what wrappers put before it."""
    return name[name.index("visual.") :]


def taken_apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return an open_clip tensor under the Hugging Face name, as views; ``in_proj`` as q, k and v."""
    name = plain(name)
    if fused := FUSED.fullmatch(name):
        layer = f"vision_model.encoder.layers.{fused[1]}.self_attn"
        return {f"{layer}.{k}_proj.{fused[2]}": part for k, part in zip("qkv", tensor.chunk(3), strict=True)}
    if name == "visual.proj":
        return {"visual_projection.weight": tensor.T}
    if inner := IN_BLOCK.fullmatch(name):
        return {f"vision_model.encoder.layers.{inner[1]}.{BLOCK.get(inner[2], inner[2])}.{inner[3]}": tensor}
    stem, _, kind = name.rpartition(".")
    return {TOP.get(name) or f"{TOP.get(stem, stem)}.{kind}": tensor}


def tower_names(tower: ImageEncoder) -> dict[str, str]:
    """Return ``{checkpoint name: parameter name}`` of the vision tower."""
    place = {id(p): name for name, p in tower.model.named_parameters()}
    return {name: place[id(p)] for name, p in tower.stored.named_parameters()}
