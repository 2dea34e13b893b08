"""Parts of a model that a config merges each in its own way (``modules``): which tensors are whose, told by their names.

mergekit knows the modules of nine architectures from a table. Here a module's tensors have its name, or another one that
it goes by, as a part of theirs (``model.encoder.layers.0.fc1.weight``); one may be named that takes all others.
"""

from collections.abc import Iterable, Sequence

from ..errors import RecipeError

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
    """Return the tensors of each module; under None those of none. One module alone has them all.

    Raises one RecipeError for modules that have no tensor, and for two that would take all others.
    """
    names = list(names)
    if len(modules) == 1:
        return {modules[0]: names, None: []}
    rest = [module for module in modules if module in REST]
    whose: dict[str | None, list[str]] = {module: [] for module in (*modules, None)}
    for name in names:
        whose[_owner(name, [m for m in modules if m not in rest]) or (rest[0] if rest else None)].append(name)
    wrong = [f"modules: {' and '.join(rest)} would each take what the others leave"] if len(rest) > 1 else []
    wrong += [
        f"modules.{module}: no tensor's name has '{' or '.join(SPELLINGS.get(module, (module,)))}' as a part"
        for module in modules
        if not whose[module] and module not in rest[1:]
    ]
    if wrong:
        raise RecipeError("; ".join(wrong), wrong)
    return whose


def _owner(name: str, modules: Sequence[str]) -> str | None:
    """Return the module whose spelling comes first in a tensor's name, the longest of them; None if none does."""
    found = []
    for module in modules:
        for part in SPELLINGS.get(module, (module,)):
            if (at := f".{name}.".find(f".{part}.")) >= 0:
                found.append((at, -len(part), module))
    return min(found)[2] if found else None
