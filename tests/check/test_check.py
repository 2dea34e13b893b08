"""`check` and `--dry-run`: everything at once, nothing written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import write_model

import merganser as library
from merganser.errors import WeightsError


def files_in(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_many_faults_are_named_in_one_run(merganser, models, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(models["a"], cut)
    whole = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    lacking = tmp_path / "lacking"
    shutil.copytree(models["b"], lacking)
    weights = load_file(lacking / "model.safetensors")
    del weights["model.norm.weight"]
    weights["extra.weight"] = torch.randn(3, 3)
    weights["lm_head.weight"] = torch.randn(64, 31)
    save_file(weights, lacking / "model.safetensors")
    out = tmp_path / "out"
    out.write_text("a file")
    done = merganser(
        "check", models["base"], cut, lacking, tmp_path / "nowhere", "--how", "dare(kep=0.5) | scale(by='x') | fisher",
        "--to", out, "--dtype", "bflot16", "--where", "*.mpl.*: scale(by=1)", "--part", "3/2", "--json",
    )  # fmt: skip
    assert done.returncode == 1
    told = json.loads(done.stdout)
    assert told["ok"] is False
    assert all(set(one) == {"what", "where", "remedy"} for one in told["errors"])
    text = json.dumps(told["errors"])
    for words in (
        "is cut short", "lacks 'model.norm.weight'", "'extra.weight'", "'lm_head.weight' [64, 31]", "nowhere", "'kep'",
        "by must be a finite number", "bflot16", "*.mpl.*", "part must be", "is a file",
    ):  # fmt: skip
        assert words in text, words
    assert out.read_text() == "a file"


def test_without_faults_it_says_what_will_be_done(merganser, models, tmp_path):
    before = files_in(tmp_path)
    how = "ties(density=0.3) | scale(by=0.9)"
    done = merganser("check", models["base"], models["a"], models["b"], "--how", how, "--to", "out", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"], told["errors"]) == (0, True, [])
    assert set(told) == {"ok", "errors", "warnings", "notes", "numbers", "plan"}
    size = (models["base"] / "model.safetensors").stat().st_size
    numbers = told["numbers"]
    assert numbers["tensors"] == numbers["merged"] == 21
    assert 0.9 * size < numbers["bytes_written"] <= size
    assert 2.7 * size < numbers["bytes_read"] <= 3 * size
    assert numbers["passes"] == 3
    assert numbers["whole_tensors"] == 0
    assert numbers["seconds"] > 0
    assert numbers["disk_free"] > numbers["bytes_written"]
    assert told["plan"]["sentence"] == "ties(density=0.3) | scale(by=0.9)"
    assert [step["kind"] for step in told["plan"]["steps"]] == ["combine", "edit"]
    assert files_in(tmp_path) == before


def test_whole_tensors_need_memory_for_the_largest(models):
    told = library.check(models["base"], [models["a"], models["b"]], "tsv").numbers
    assert told["whole_tensors"] == told["merged"]
    assert told["memory"] > library.check(models["base"], [models["a"], models["b"]], "average").numbers["memory"]


def test_a_missing_ingredient_is_named(models):
    found = library.check(models["base"], [models["a"], models["b"]], "fisher", ingredients={"fischer": models["a"]})
    text = "\n".join(map(str, found.errors))
    assert "needs the ingredient 'fisher'" in text
    assert "no step of 'fisher' takes an ingredient 'fischer' (did you mean 'fisher'?)" in text


def test_what_shapes_do_not_show_is_warned_of(models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models["b"], other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8, "vocab_size": 99}))
    weights = {n: t.bfloat16() for n, t in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors")
    found = library.check(models["base"], [models["a"], other], "average")
    assert found.ok
    warned = "\n".join(map(str, found.warnings))
    assert "num_attention_heads is 8, the base's is 4" in warned
    assert "vocab_size 99" in warned
    assert "BF16 there, F32 in the base" in "\n".join(map(str, found.notes))


def test_an_output_that_holds_a_model_or_an_input_is_told(models, tmp_path):
    old = write_model(tmp_path / "old", 7)
    experts = [models["a"], models["b"]]
    found = library.check(models["base"], experts, "average", into=old)
    assert found.ok
    assert "holds a model" in str(found.warnings[0])
    found = library.check(models["base"], experts, "average", into=models["a"])
    assert "holds an input" in str(found.errors[0])


def test_a_folder_that_another_process_writes_is_told(models, tmp_path):
    from merganser.weights.sink import Sink

    sink = Sink(tmp_path / "busy", {"x": ("F32", (2,))})
    found = library.check(models["base"], [models["a"]], "average", into=tmp_path / "busy")
    assert "another process" in str(found.errors[0])
    sink.abandon()
    assert library.check(models["base"], [models["a"]], "average", into=tmp_path / "busy").ok


def test_merge_raises_all_that_is_wrong_together(models, tmp_path):
    with pytest.raises(WeightsError, match="no such file") as told:
        library.merge(models["base"], [tmp_path / "nowhere"], "ties(density=7)", dtype="bflot16", into=tmp_path / "out")
    text = str(told.value)
    assert "3 things are wrong" in text
    assert "density must lie in (0, 1], got 7" in text
    assert "bflot16" in text
    assert not (tmp_path / "out").exists()


def test_dry_run_of_merge_writes_nothing_and_says_what_would_be_done(merganser, models, tmp_path):
    before = files_in(tmp_path)
    words = ("merge", models["base"], models["a"], models["b"], "--how", "ties", "--to", "out", "--dry-run")
    done = merganser(*words)
    assert done.returncode == 0, done.stderr
    assert "nothing prevents it" in done.stdout
    assert "21 merged, 0 copied" in done.stdout
    done = merganser(*words[:-2], models["base"] / "config.json" / "out", "--dry-run")
    assert done.returncode == 1
    assert "config.json is a file" in done.stdout
    assert files_in(tmp_path) == before


def test_dry_runs_of_demo_and_bench_write_nothing(merganser, tmp_path):
    done = merganser("demo", "--to", "d", "--dry-run", "--json")
    told = json.loads(done.stdout)
    stages = told["plan"]["stages"]
    assert {stage["done"] for stage in stages} == {False}
    assert any(stage["stage"].startswith("adapt digits by ri(") for stage in stages)
    done = merganser("bench", "text", "--data", "nowhere", "--how", "ties(densty=1)", "--dry-run", "--json")
    assert done.returncode == 1
    text = json.dumps(json.loads(done.stdout)["errors"])
    assert "no such folder of tasks" in text
    assert "'densty'" in text
    assert list(tmp_path.iterdir()) == []


RECIPE = """
sentences = ["tise", "ri(stepps=3) | average", "average"]
[model]
base = "{base}"
[experts]
a = "{a}"
b = "nowhere"
[tasks]
a = "tasks/a"
[inputs]
files = ["inputs.txt"]
[domains]
elsewhere = "shift/elsewhere"
"""


def test_a_recipe_is_checked_whole(merganser, models, tmp_path, monkeypatch):
    monkeypatch.setenv("MERGANSER_DEVICE", "gpu")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(**models))
    before = files_in(tmp_path)
    for words in (("check", "recipe.toml"), ("run", "recipe.toml", "--dry-run"), ("adapt", "recipe.toml", "--dry-run")):
        done = merganser(*words, "--json")
        assert done.returncode == 1
        assert done.stderr == ""
        text = json.dumps(json.loads(done.stdout)["errors"])
        for words in (
            "unknown step 'tise'", "'stepps'", "nowhere", "tasks/a: not a task", "expert 'b' has no task", "inputs.txt",
            "shift/elsewhere: not a task", "MERGANSER_DEVICE=gpu",
        ):  # fmt: skip
            assert words in text, words
    assert files_in(tmp_path) == before
