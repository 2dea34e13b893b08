"""The text and vision suites' tasks from data sets in the Hub's layout."""

import io
import json

import numpy as np
import pytest

from merganser.errors import DataError
from merganser.evaluate.pictures import Pictures
from merganser.evaluate.task import read_tasks
from merganser.evaluate.unlabeled import read_unlabeled
from merganser.suites import text, vision
from merganser.suites.hub import MOST, TEXTS, UNLABELED, located

pyarrow = pytest.importorskip("pyarrow", reason="the 'hf' extra is not installed")


def write(path, rows, names=None, label="label", nested=False):
    """Write a parquet as `datasets` does: the names of the labels are in the schema."""
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(rows)
    if names:
        feature = {"names": names, "_type": "ClassLabel"}
        says = {"info": {"features": {label: {"feature": feature} if nested else feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(says)})
    pyarrow.parquet.write_table(table, path)


def labelled(n, classes, text="text", label="label"):
    return {text: [f"row {k}" for k in range(n)], label: [k % classes for k in range(n)]}


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "root"
    of = {name: root / told.dataset for name, told in TEXTS.items()}
    for split, n in (("train", 80), ("test", 20)):
        part = f"data/{split}-00000-of-00001.parquet"
        write(of["agnews"] / part, labelled(n, 4), ["World", "Sports", "Business", "Sci/Tech"])
        rows = labelled(n, 77)
        rows["label_text"] = [f"intent_{k}" for k in rows["label"]]
        write(of["banking77"] / part, {**rows, "text": [f"{split} {t}" for t in rows["text"]]})
        intents = [*(f"name_{k}" for k in range(3)), "oos", "last_one"]
        write(of["clinc150"] / "plus" / part, labelled(n, 5, label="intent"), intents, "intent")
        nested = {"sentences": [["one", "two"]] * n, "labels": [[0, 1]] * n}
        write(of["csabstruct"] / part, nested, ["background", "method"], "labels", nested=True)
        subj = labelled(n, 2)
        lines = [json.dumps({"text": t, "label": k}) for t, k in zip(subj["text"], subj["label"], strict=True)]
        of["subj"].mkdir(parents=True, exist_ok=True)
        (of["subj"] / f"{split}.jsonl").write_text("\n".join(lines))
        rows = labelled(n, 6, label="label_coarse")
        rows["label_coarse_text"] = [f"KIND_{k}" for k in rows["label_coarse"]]
        write(of["trec6"] / part, rows)
    write(of["sms_spam"] / "plain_text" / "train-00000-of-00001.parquet", labelled(100, 2, "sms"), ["ham", "spam"])
    names, hidden = ["negative", "positive"], labelled(9, 1, "sentence")
    write(of["sst2"] / "data" / "train-00000-of-00001.parquet", labelled(60, 2, "sentence"), names)
    write(of["sst2"] / "data" / "validation-00000-of-00001.parquet", labelled(30, 2, "sentence"), names)
    write(of["sst2"] / "data" / "test-00000-of-00001.parquet", {**hidden, "label": [-1] * 9}, names)
    wiki = {
        "text": [" = Heading = ", "", *(f"sentence number {k} with enough words to be one of them" for k in range(50))]
    }
    write(root / UNLABELED["text"] / "wikitext-2-raw-v1" / "train-00000-of-00001.parquet", wiki)
    return root


def test_the_eight_text_tasks_are_made_of_their_data_sets(texts):
    folder = located("text", texts)
    tasks = read_tasks(folder)
    assert set(tasks) == set(TEXTS)
    for task in tasks.values():
        for split in ("train", "val", "test"):
            assert 0 < len(task.split(split)) <= MOST[split]
        train, test = ({*map(str, task.split(s).raw)} for s in ("train", "val"))
        assert task.name == "csabstruct" or not train & test, "val is not trained on"
    assert tasks["banking77"].classes[5] == "intent 5", "named by the column label_text"
    assert tasks["trec6"].classes == [f"kind {k}" for k in range(6)]
    assert tasks["clinc150"].classes == ["name 0", "name 1", "name 2", "last one"], "out of scope is left out"
    assert tasks["clinc150"].split("test").labels.max() == 3
    assert tasks["sst2"].classes == ["negative", "positive"]
    assert len(tasks["sst2"].split("test")) == 30, "the test labels are hidden: the validation rows"
    assert len(tasks["sms_spam"].split("test")) == 25, "a part of its only split"
    assert len(tasks["csabstruct"].split("test")) == 40, "a row is an abstract"
    assert set(text.SUITE.tasks(folder)) == set(tasks)
    assert len(read_unlabeled(text.SUITE.files(folder))) == 50, "no headings"


def test_a_folder_of_tasks_is_taken_as_it_is(tmp_path):
    assert located("text", tmp_path) == tmp_path


def test_a_data_set_that_is_missing_is_named(texts):
    import shutil

    shutil.rmtree(texts / "SetFit")
    with pytest.raises(DataError, match="no data set SetFit/subj"):
        located("text", texts)


def test_the_vision_tasks_stay_where_they_lie(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="the 'demo' extra is not installed")
    from merganser.suites.clip import facts
    from merganser.suites.hub import PICTURES

    def bytes_of(k):
        out = io.BytesIO()
        image.fromarray(np.random.default_rng(k).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(out, "PNG")
        return {"bytes": out.getvalue(), "path": None}

    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "root"
    for name in PICTURES.values():
        for split, n in (("train", 30), ("test", 6)):
            rows = {"image": [bytes_of(k) for k in range(n)], "label": [k % 10 for k in range(n)]}
            write(root / facts()[name]["dataset"] / "data" / f"{split}-00000-of-00001.parquet", rows)
    rows = {"image": [bytes_of(k) for k in range(12)], "label": [0] * 12}
    write(root / UNLABELED["vision"] / "data" / "train-00000-of-00001.parquet", rows)
    folder = located("vision", root)
    tasks = vision.SUITE.tasks(folder)
    assert list(tasks) == sorted(PICTURES)
    assert [len(tasks["mnist"].split(s)) for s in ("train", "val", "test")] == [27, 3, 6]
    inputs = read_unlabeled(vision.SUITE.files(folder))
    assert isinstance(inputs, Pictures)
    assert len(inputs) == 12
    prepared = vision.CONV.of(folder)
    assert prepared.network == "conv"


def test_a_folder_of_tasks_is_one_whatever_its_tasks_are_called(tmp_path):
    """`cifar10` is a task here and a data set on the Hub."""
    for name in ("cifar10", "mnist"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.toml").write_text(f'name = "{name}"\nkind = "image"\nclasses = ["x", "y"]\n')
    assert located("vision", tmp_path) == tmp_path
