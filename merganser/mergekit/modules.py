"""Parts of a model that a config merges each in its own way (``modules``): which tensors are whose, told by their names.

mergekit knows the modules of nine architectures from a table. Here a module's tensors have its name, or another one that
it goes by, as a part of theirs (``model.encoder.layers.0.fc1.weight``); one may be named that takes all others.
"""

from collections.abc import Iterable, Iterator, Sequence

from ..errors import RecipeError, did_you_mean

REST = ("text_decoder", "shared", "default")
SIGHT = ("vision_tower", "vision_model", "visual")
SPELLINGS = {
    "vision_tower": SIGHT,
    "vision_model": SIGHT,
    "multi_modal_projector": (
        "multi_modal_projector",
        "mm_projector",
        "visual.merger",
        "visual.deepstack_merger_list",
    ),
}
COUNTS = {  # where a config.json has the number of layers
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
PARTS = {"text_decoder": "text_config", "vision_tower": "vision_config", "vision_model": "vision_config"}


def shared_out(modules: Sequence[str], names: Iterable[str]) -> dict[str | None, list[str]]:
    """Return a model's tensors of each module; under None those of none. One module alone has them all."""
    names = list(names)
    if len(modules) == 1:
        return {modules[0]: names, None: []}
    rest = next((module for module in modules if module in REST), None)
    whose: dict[str | None, list[str]] = {module: [] for module in (*modules, None)}
    for name in names:
        whose[_owner(name, [m for m in modules if m not in REST]) or rest].append(name)
    return whose


def two_rests(modules: Sequence[str]) -> Iterator[RecipeError]:
    """Yield what is wrong where two modules would take all that the others leave."""
    rest = [module for module in modules if module in REST]
    if len(rest) > 1:
        yield RecipeError(f"modules: {' and '.join(rest)} would each take what the others leave")


def nothing(module: str, model: object, names: Iterable[str]) -> RecipeError:
    """Return what is wrong with a module of which a model with these tensors has none."""
    parts = "' or '".join(SPELLINGS.get(module, (module,)))
    guess = did_you_mean(module, {part for name in names for part in name.split(".")})
    return RecipeError(f"modules.{module}: no tensor of '{model}' has '{parts}' as a part of its name{guess}")


def _owner(name: str, modules: Sequence[str]) -> str | None:
    """Return the module whose spelling comes first in a tensor's name, the longest of them; None if none does."""
    found = []
    for module in modules:
        for part in SPELLINGS.get(module, (module,)):
            if (at := f".{name}.".find(f".{part}.")) >= 0:
                found.append((at, -len(part), module))
    return min(found)[2] if found else None
