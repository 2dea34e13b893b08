"""Merge what a mergekit YAML says, and put config, tokenizer and the YAML itself beside the weights."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..card import read_card
from ..errors import RecipeError
from ..progress import Progress, silent
from ..weights.header import Weights, folder_of
from ..weights.open import open_weights
from ..weights.save import refuse_overwriting
from ..weights.stored import Stored
from ..weights.tokenizer import edit_json, read_config, write_dtype
from .chain import in_order, place_of, plans
from .config import CHATS, Told, read_configs
from .jobs import Plan, plan_one
from .layers import restack, stacks
from .modules import shared_out

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
    from the papers and what the config does not do; ``shard_size`` as in `merge`. Of several configs in the file those
    that have a name are written to INTO/name, and are not merged again while they and what they are of stay as they are.
    Raises RecipeError (the YAML), WeightsError, SentenceError.
    """
    from ..examine import check_output, check_shards
    from ..merge import Output

    check_shards(shard_size, into, "model")
    told = read_configs(path)
    if len(told) > 1:
        return _in_turn(Path(path), told, into, seed, shard_size, progress, say)
    made = plan_one(Path(path), told[0], seed, open_weights)
    for note in made.notes:
        say(note)
    if into is None:
        output = Output(made.origin, made.names, check_output(made.dtype, "model"))
        return output.in_memory(made.jobs, progress)
    refuse_overwriting(into, *made.inputs)
    return _streamed(made, Path(into), seed, shard_size, progress)


def _in_turn(
    path: Path, told: Sequence[Told], into: str | Path | None, seed: int, shard_size: int | str | None,
    progress: Progress, say: Callable[[str], None],
) -> "Mapping[str, Tensor]":  # fmt: skip
    """Merge several configs, those first that others name; one that is done already is left as it is."""
    from ..merge import job_key

    if into is None:
        raise RecipeError(
            f"{path}: holds {len(told)} configs, one of another's result: give a folder for them (--to, into=FOLDER)"
        )
    for planned, folder in plans(path, into, seed=seed):
        refuse_overwriting(folder or into, *planned.inputs)
    made: dict[str, Weights] = {}
    written: Mapping[str, Tensor] = {}
    for one in in_order(path, told):
        folder = place_of(one, into)
        planned = plan_one(path, one, seed, open_weights, made)
        key = job_key(card_of(planned, seed, shard_size), planned.jobs)
        if (read_card(folder) or {}).get("job") == key:
            say(f"{folder}: done already")
            written = Stored(folder)
        else:
            for note in planned.notes:
                say(f"{one.name}: {note}" if one.name else note)
            written = _streamed(planned, folder, seed, shard_size, progress, {"job": key})
        if one.name:
            made[one.name] = written
    return written


def _streamed(
    made: Plan, into: Path, seed: int, shard_size: int | str | None, progress: Progress,
    more: Mapping[str, Any] | None = None,
) -> "Stored":  # fmt: skip
    from ..examine import check_output
    from ..merge import Output

    output = Output(made.origin, made.names, check_output(made.dtype, "model"))
    template = chat_template(made)

    def carried(staging: Path) -> None:
        if made.write_tokenizer is not None:
            made.write_tokenizer(staging)
        configure(made, staging)
        (staging / YAML).write_text(made.text, encoding="utf-8")
        if template is not None:
            (staging / TEMPLATE).write_text(template, encoding="utf-8")
            edit_json(staging / "tokenizer_config.json", lambda told: told.pop("chat_template", None))

    return output.streamed(made.jobs, into, card_of(made, seed, shard_size, more), carried=carried, progress=progress)


def card_of(
    made: Plan, seed: int, shard_size: int | str | None = None, more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return how the result comes to be: method, models, sentences, and the YAML."""
    most = sorted(made.sentences.items(), key=lambda item: -item[1])
    return {
        "kind": "merge",
        "sentence": made.sentence,
        "seed": seed,
        "own": [],
        **({"dtype": made.dtype} if made.dtype else {}),
        **({"shard_size": shard_size} if shard_size is not None else {}),
        **(more or {}),
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
    layers: dict[str, list[tuple[dict[str, Any], int]]] = {}
    for laid in made.laid:
        if laid.layers is not None and laid.section is not None:
            first = made.models[made.short[laid.slice.sources[0].model]]
            layers.setdefault(laid.section.name, []).extend((read_config(folder_of(first)), i) for i in laid.layers)
    modules = [section.name for section in made.config.sections]

    def change(told: dict[str, Any]) -> None:
        for module, those in layers.items():
            depth = next(iter(stacks(shared_out(modules, donor)[module]).values()))
            restack(told, those, depth, module if len(modules) > 1 else "")

    edit_json(folder / "config.json", change)
    if made.dtype:
        write_dtype(folder, made.dtype, add=True)


def chat_template(made: Plan) -> str | None:
    """Return the chat template that the config asks for: its text, one by name, or that of most models ("auto")."""
    asked = made.config.chat_template
    if asked is None or "{" in asked:
        return asked
    if asked != "auto":
        return (CHATS / f"{asked}.jinja").read_text(encoding="utf-8")
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
