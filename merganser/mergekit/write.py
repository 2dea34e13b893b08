"""Merge what a mergekit YAML says, and put config, tokenizer and the YAML itself beside the weights."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..progress import Progress, silent
from ..weights.header import folder_of
from ..weights.open import open_weights
from ..weights.save import refuse_overwriting
from ..weights.tokenizer import edit_json, read_config, write_dtype
from .jobs import Plan, plan
from .layers import restack, stacks

if TYPE_CHECKING:
    from torch import Tensor

YAML = "mergekit_config.yml"
TEMPLATE = "chat_template.jinja"


def merge_config(
    path: str | Path,
    *,
    into: str | Path | None = None,
    seed: int = 0,
    shard_size: int | str | None = None,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda line: None,
) -> "Mapping[str, Tensor]":
    """Merge as the mergekit YAML at ``path`` says, into a folder, or in memory without one.

    Numbers are mergekit's up to rounding: computed in fp32, rounded once. ``say`` is told in a line each what differs
    from the papers and what the config does not do; ``shard_size`` as in `merge`.
    Raises RecipeError (the YAML), WeightsError, SentenceError.
    """
    from ..examine import check_output, check_shards
    from ..merge import Output

    check_shards(shard_size, into, "model")
    made = plan(path, seed=seed, opened=open_weights)
    template = chat_template(made)
    for note in made.notes:
        say(note)
    output = Output(made.origin, made.names, check_output(made.dtype, "model"))
    if into is None:
        return output.in_memory(made.jobs, progress)
    refuse_overwriting(into, *made.inputs)

    def carried(staging: Path) -> None:
        if made.write_tokenizer is not None:
            made.write_tokenizer(staging)
        configure(made, staging)
        (staging / YAML).write_text(made.text, encoding="utf-8")
        if template is not None:
            (staging / TEMPLATE).write_text(template, encoding="utf-8")
            edit_json(staging / "tokenizer_config.json", lambda told: told.pop("chat_template", None))

    card = card_of(made, seed) | ({"shard_size": shard_size} if shard_size is not None else {})
    return output.streamed(made.jobs, Path(into), card, carried=carried, progress=progress)


def card_of(made: Plan, seed: int) -> dict[str, Any]:
    """Return how the result comes to be: method, models, sentences, and the YAML."""
    most = sorted(made.sentences.items(), key=lambda item: -item[1])
    return {
        "kind": "merge",
        "sentence": made.sentence,
        "seed": seed,
        "own": [],
        **({"dtype": made.dtype} if made.dtype else {}),
        "mergekit": {
            "method": made.method.name,
            "models": {name: str(ref) for ref, name in made.short.items()},
            "config": made.config.model_dump(mode="json", exclude_none=True),
            "sentences": [{"sentence": sentence, "tensors": count} for sentence, count in most],
            "copied": len(made.origin) - sum(made.sentences.values()),
            "notes": made.notes,
        },
    }


def configure(made: Plan, folder: Path) -> None:
    """Write number of layers and dtype of the output into its config.json."""
    donor = next(iter(made.models.values()))
    layers: list[tuple[dict[str, Any], int]] = []
    for laid in made.laid:
        first = made.models[made.short[laid.slice.sources[0].model]]
        layers += [(read_config(folder_of(first)), i) for i in laid.layers or ()]

    def change(told: dict[str, Any]) -> None:
        if layers:
            restack(told, layers, next(iter(stacks(donor).values())))

    edit_json(folder / "config.json", change)
    if made.dtype:
        write_dtype(folder, made.dtype, add=True)


def chat_template(made: Plan) -> str | None:
    """Return the chat template that the config asks for: its text, or the one that most models have ("auto")."""
    if made.config.chat_template != "auto":
        return made.config.chat_template
    found = [text for weights in made.models.values() if (text := _template(folder_of(weights)))]
    return Counter(found).most_common(1)[0][0] if found else None


def _template(folder: Path | None) -> str | None:
    """Return the chat template of a model's tokenizer, None where it has none."""
    if folder is None:
        return None
    if (file := folder / TEMPLATE).is_file():
        return file.read_text(encoding="utf-8").strip()
    told = read_config(folder, "tokenizer_config.json").get("chat_template")
    if isinstance(told, list):  # several by name
        told = next((one.get("template") for one in told if one.get("name") == "default"), None)
    return told.strip() if isinstance(told, str) else None
