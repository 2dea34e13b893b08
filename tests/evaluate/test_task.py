"""Tasks and unlabeled inputs from files: every format the same rows, every fault one line with the file's name."""

import gzip
import json

import pytest

from merganser.errors import DataError
from merganser.evaluate.task import read_split, read_task, read_tasks

ROWS = [{"text": f"text {k} – ü", "label": k % 3} for k in range(9)]


def make(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    told = {"name": folder.name, "kind": "text", "classes": ["a", "b", "c"], "template": "about {}", **changes}
    (folder / "task.toml").write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in told.items() if v is not None))
    with gzip.open(folder / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, ROWS)))
    return folder


def test_all_text_formats_give_the_same_rows(tmp_path):
    lines = make(tmp_path / "t") / "test.jsonl.gz"
    plain = tmp_path / "test.jsonl"
    plain.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    paths = [lines, plain]
    try:
        import pyarrow
        import pyarrow.parquet

        paths.append(tmp_path / "test.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), paths[-1])
    except ImportError:
        pass
    for path in paths:
        split = read_split(path)
        assert split.raw == [row["text"] for row in ROWS]
        assert split.labels.tolist() == [row["label"] for row in ROWS]


def test_a_task_knows_its_prompts_and_splits(tmp_path):
    task = read_task(make(tmp_path / "t"))
    assert task.prompts() == [["about a"], ["about b"], ["about c"]]
    assert list(task.splits) == ["test"]
    assert len(task.split("test").first(4)) == 4
    with pytest.raises(DataError, match="task 't' has no train split; it has: test"):
        task.split("train")
    assert list(read_tasks(tmp_path)) == ["t"]


def test_faults_of_a_task_are_named(tmp_path):
    def says(match, folder=None, **changes):
        with pytest.raises(DataError, match=match):
            read_task(folder or make(tmp_path / "t", **changes))

    says("no task.toml", tmp_path / "nowhere")
    says("lacks 'classes'", classes=None)
    says(r"unknown metric 'acuracy' \(did you mean 'accuracy'\?\)", metric="acuracy")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "task.toml").write_text("name = ")
    says("not valid TOML", tmp_path / "broken")
    with pytest.raises(DataError, match="label 2 in test, but only 2 classes"):
        read_task(make(tmp_path / "t", classes=["a", "b"])).split("test")
    with pytest.raises(DataError, match="no task here"):
        read_tasks(tmp_path / "t")


def test_faults_of_rows_are_named(tmp_path):
    def says(match, text):
        path = tmp_path / "test.jsonl"
        path.write_text(text)
        with pytest.raises(DataError, match=match):
            read_split(path)

    says("line 2", '{"text": "a", "label": 0}\nnot json')
    says(r"row 1: needs a 'text' \(a string\) and a 'label'", '{"text": 3, "label": 0}')
    says("row 2", '{"text": "a", "label": 0}\n{"text": "b", "label": "0"}')
    says("every line must be an object", "[1, 2]")
