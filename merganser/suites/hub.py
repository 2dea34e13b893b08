"""The text and vision suites' tasks from the Hugging Face Hub, as a folder of tasks in the cache, for machines without one.

Data sets are looked for as `sources.dataset` does. Texts are few, so they are written out as tasks; pictures stay in the
files of their data sets. Splits are the official ones where a set has them, with labels; a set that hides its test
labels gives its validation rows instead, and one that has a train split alone gives parts of it. Numbers are therefore
not those of other splits of the same sets.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..card import key_of
from ..errors import DataError, MissingExtra
from ..evaluate.pictures import split_files
from . import sources
from .cache import cache_folder
from .clip import facts

MOST = {"train": 6000, "val": 600, "test": 2000}  # rows of a text task
PICTURES = {"cifar10": "CIFAR10", "fashion_mnist": "FashionMNIST", "gtsrb": "GTSRB", "kmnist": "KMNIST"}
PICTURES |= {"mnist": "MNIST", "svhn": "SVHN", "emnist_letters": "EMNIST-letters", "eurosat": "EuroSAT"}
UNLABELED = {"text": "Salesforce/wikitext", "vision": "zh-plus/tiny-imagenet"}


@dataclass(frozen=True)
class Texts:
    """A data set of texts: its name on the Hub, its columns, what its classes are called in prompts."""

    dataset: str
    text: str = "text"
    label: str = "label"
    phrases: Sequence[str] = ()  # else the names that the data set gives its labels
    template: str = "{}"
    metric: str = "accuracy"
    drop: str = ""  # a class that is left out


TEXTS = {
    "agnews": Texts("fancyzhx/ag_news", phrases=("world", "sports", "business", "science and technology")),
    "banking77": Texts("mteb/banking77"),
    "clinc150": Texts("clinc/clinc_oos", label="intent", drop="oos"),
    "csabstruct": Texts("allenai/csabstruct", text="sentences", label="labels", template="a sentence about the {}"),
    "sms_spam": Texts("ucirvine/sms_spam", text="sms", phrases=("message of a friend", "spam"), metric="macro_f1"),
    "sst2": Texts("stanfordnlp/sst2", text="sentence", template="a {} movie review"),
    "subj": Texts("SetFit/subj", phrases=("objective statement", "subjective opinion")),
    "trec6": Texts("SetFit/TREC-QC", label="label_coarse", template="a question about {}"),
}


def located(suite: str, data: Path | None) -> Path:
    """Return a folder of tasks: ``data``, or the suite's own sets from ``data`` in the Hub's layout, or from the Hub."""
    first = next(iter(TEXTS.values())).dataset if suite == "text" else facts()["CIFAR10"]["dataset"]
    if data is not None and any(data.glob("*/task.toml")):  # a task may well be called as its data set
        return data
    if data is not None and not any((data / name).is_dir() for name in (first, first.partition("/")[2])):
        return data
    return hub_tasks(suite, data)


def hub_tasks(suite: str, root: Path | None) -> Path:
    """Write the tasks of the text or vision suite into the cache and return their folder."""
    into = cache_folder() / "hub" / suite / key_of({"root": str(root)})[:8]
    for name in TEXTS if suite == "text" else PICTURES:
        (text_task if suite == "text" else picture_task)(into / name, name, root)
    unlabeled(into / "aux", suite, root)
    return into


def picture_task(folder: Path, name: str, root: Path | None) -> None:
    """Write task.toml for a set of pictures, which stay where they are."""
    told = facts()[PICTURES[name]]
    says = {"name": name, "kind": "image", "classes": told["classes"], "template": told["template"]}
    sources.write_task(folder.parent, says, sources.dataset(root, told["dataset"]), keyed=False, held_out=1000)


def text_task(folder: Path, name: str, root: Path | None) -> None:
    """Write a task of texts, unless it is there."""
    if (folder / "task.toml").is_file():
        return
    told = TEXTS[name]
    place = sources.dataset(root, told.dataset)
    rows: dict[str, list[tuple[str, int]]] = {}
    names: list[str] = []
    for split, called in sources.SPLITS.items():
        files = next((found for word in called if (found := _files(place, word))), [])
        read = [_read(file, told) for file in files]
        rows[split] = [(words, label) for some, _ in read for words, label in some if label >= 0]
        names = max([names, *(known for _, known in read)], key=len)
    rows = _filled(rows, place)
    phrases = list(told.phrases) or [one.replace("_", " ").lower() for one in names]
    if not phrases:
        raise DataError(f"{place}: nothing says what the labels are called")
    if told.drop in names:
        rows, phrases = _without(rows, phrases, names.index(told.drop))
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in rows.items():
        lines = [json.dumps({"text": words, "label": label}) + "\n" for words, label in part[: MOST[split]]]
        (folder / f"{split}.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    says = {"name": name, "kind": "text", "classes": phrases, "template": told.template, "metric": told.metric}
    (folder / "task.toml").write_text(sources.toml({**says, "source": told.dataset}), encoding="utf-8")


def unlabeled(folder: Path, suite: str, root: Path | None) -> None:
    """Write (texts) or link (pictures) unlabeled inputs."""
    place = sources.dataset(root, UNLABELED[suite])
    files = _files(place, "train")
    if not files:
        raise DataError(f"{place}: no train split")
    folder.mkdir(parents=True, exist_ok=True)
    if suite == "vision":
        for file in files:
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file.resolve())
        return
    lines = [line for file in files for line in _lines(file) if len(line) > 40 and not line.startswith("=")]
    with gzip.open(folder / "wikitext.txt.gz", "wt", encoding="utf-8") as out:
        out.writelines(line[:400] + "\n" for line in lines[:40_000])


def _files(place: Path, split: str) -> list[Path]:
    found = split_files(place, split)
    return found or sorted([*place.glob(f"**/{split}.jsonl"), *place.glob(f"**/{split}.json")])


def _lines(file: Path) -> Iterator[str]:
    return (text.strip() for text in _table(file)[0]["text"])


def _read(file: Path, told: Texts) -> tuple[list[tuple[str, int]], list[str]]:
    """Return the rows of a file and what its labels are called ([] if it does not say)."""
    columns, names = _table(file, told.label)
    if missing := [one for one in (told.text, told.label) if one not in columns]:
        raise DataError(f"{file}: no column '{missing[0]}' (it has {', '.join(columns)})")
    texts, labels = columns[told.text], columns[told.label]
    if texts and isinstance(texts[0], list):  # a row of several sentences
        texts, labels = [s for row in texts for s in row], [n for row in labels for n in row]
    if not names and "label_text" in columns and told.label == "label":
        names = _named(labels, columns["label_text"])
    if not names and f"{told.label}_text" in columns:
        names = _named(labels, columns[f"{told.label}_text"])
    return [(text, int(label)) for text, label in zip(texts, labels, strict=True)], names


def _named(labels: Sequence[int], words: Sequence[str]) -> list[str]:
    known = dict(zip(labels, words, strict=True))
    return [known[k] for k in sorted(known)] if sorted(known) == list(range(len(known))) else []


def _table(file: Path, label: str = "") -> tuple[dict[str, list[Any]], list[str]]:
    """Return a file's columns and the names that its features give the labels."""
    if file.suffix != ".parquet":
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {key: [row.get(key) for row in rows] for key in (rows[0] if rows else ())}, []
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra(f"{file}", "hf") from None
    table = pyarrow.parquet.read_table(file)
    says = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = says.get("info", {}).get("features", {}).get(label, {})
    feature = feature if "names" in feature else feature.get("feature", {})
    return table.to_pydict(), list(feature.get("names", []))


def _filled(rows: dict[str, list[Any]], place: Path) -> dict[str, list[Any]]:
    """Return shuffled rows of train, val and test; those that a set lacks are taken from the one before."""
    if not rows["train"]:
        raise DataError(f"{place}: no train split with labels")
    rng = np.random.default_rng(0)
    mixed = {split: [found[k] for k in rng.permutation(len(found))] for split, found in rows.items()}
    if not mixed["test"]:
        mixed["test"], mixed["val"] = mixed["val"], []
    for split, share in (("test", 4), ("val", 10)):
        if not mixed[split]:
            cut = min(MOST[split], len(mixed["train"]) // share)
            mixed[split], mixed["train"] = mixed["train"][:cut], mixed["train"][cut:]
    return mixed


def _without(rows: dict[str, list[Any]], phrases: list[str], gone: int) -> tuple[dict[str, list[Any]], list[str]]:
    kept = {s: [(text, k - (k > gone)) for text, k in found if k != gone] for s, found in rows.items()}
    return kept, [phrase for k, phrase in enumerate(phrases) if k != gone]
