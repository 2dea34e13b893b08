"""What other mergers accept without a word, done to the real command line."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_llama import write_model

from merganser import open_weights


def one_line(done, *words):
    """Assert that a command failed with one clear line that has these words."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def merge(merganser, models, how, to, *more):
    return merganser("merge", models["base"], models["a"], models["b"], "--how", how, "--to", to, *more)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("ties(densty=0.2)", ["'ties' has no knob 'densty'", "did you mean 'density'"]),
        ("ties(density=50)", ["density", "got 50"]),
        ("ties(density=-3)", ["density", "got -3"]),
        ("dare(keep=50) | average", ["keep", "got 50"]),
        ("tise", ["unknown step 'tise'", "did you mean 'ties'"]),
        ("dare-ties", ["dare"]),
    ],
)
def test_a_wrong_word_or_knob_is_refused_and_named(merganser, models, tmp_path, how, words):
    one_line(merge(merganser, models, how, tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_a_misspelt_option_is_refused(merganser, models, tmp_path):
    done = merge(merganser, models, "average", tmp_path / "out", "--normalise")
    assert done.returncode == 2
    assert "normalise" in done.stderr


def test_a_misspelt_dtype_is_refused_before_any_work(merganser, models, tmp_path):
    one_line(merge(merganser, models, "average", tmp_path / "out", "--dtype", "bflot16"), "'bflot16'", "'bfloat16'")
    assert not (tmp_path / "out").exists()


def test_a_missing_folder_is_named_as_a_folder(merganser, models, tmp_path):
    done = merganser("merge", models["base"], tmp_path / "nowhere", "--how", "average", "--to", tmp_path / "out")
    one_line(done, str(tmp_path / "nowhere"), "no such file or folder")


def test_vocabularies_that_differ_by_three_are_named_with_tensor_shapes_and_remedy(merganser, models, tmp_path):
    other = write_model(tmp_path / "more", 3, vocab=67)
    done = merganser("merge", models["base"], other, "--how", "ties", "--to", tmp_path / "out")
    one_line(done, "'lm_head.weight'", "[64, 32]", "[67, 32]", "vocabulary=")
    assert not (tmp_path / "out").exists()
    done = merganser("merge", models["base"], other, "--how", "ties", "--to", tmp_path / "out", "--vocabulary", "union")
    assert done.returncode == 0, done.stderr
    assert len(open_weights(tmp_path / "out")["model.embed_tokens.weight"]) == 67


def test_nan_in_one_expert_is_named_and_nothing_is_written(merganser, models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models["b"], broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, broken / "model.safetensors")
    done = merganser("merge", models["base"], models["a"], broken, "--how", "average", "--to", tmp_path / "out")
    one_line(done, "expert 'broken'", "NaN", "'model.layers.1.mlp.up_proj.weight'")
    left = [p for p in (tmp_path / "out").rglob("*") if p.is_file()] if (tmp_path / "out").exists() else []
    assert left == []


def test_a_second_merge_leaves_nothing_of_a_sharded_one_before(merganser, models, tmp_path):
    out = write_model(tmp_path / "out", 5, shard="30KB")
    assert (out / "model.safetensors.index.json").is_file()
    done = merge(merganser, models, "average", out)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.glob("model*")) == ["model.safetensors"]
    ours = open_weights(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).state_dict()
    base, a, b = (open_weights(models[name]) for name in ("base", "a", "b"))
    for name in base:
        torch.testing.assert_close(ours[name], (a[name] + b[name]) / 2)
        assert torch.equal(ours[name], theirs[name])


def test_the_tokenizer_is_carried(merganser, models, tmp_path):
    assert merge(merganser, models, "ties", tmp_path / "out").returncode == 0
    kept = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert kept == json.loads((models["base"] / "tokenizer.json").read_text())


def test_a_warning_is_one_line_and_told_once(merganser, tmp_path):
    base = {f"layers.{k}.weight": torch.randn(64, 64) for k in range(4)}
    coarse = {n: (t + torch.randint(-1, 2, t.shape) * 0.01) for n, t in base.items()}
    for name, weights in {"base": base, "a": coarse, "b": {n: 2 * t for n, t in coarse.items()}}.items():
        weights = {n: (t * 128).round() / 128 for n, t in weights.items()}
        save_file(weights, tmp_path / f"{name}.safetensors")
    done = merganser("merge", "base.safetensors", "a.safetensors", "b.safetensors", "--how", "ties(scope='tensor')")
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(warned) == 1
    assert warned[0].startswith("warning: ")
    assert "share" in warned[0]
