"""What is told is heard or refused, and a check says all of it at once."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import merganser as library
from merganser.errors import MerganserError


def refused(done, *words, status=1):
    assert done.returncode == status, done.stdout + done.stderr
    said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    for word in words:
        assert word in said
    assert "Traceback" not in said


@pytest.mark.parametrize("verb", ["merge", "check"])
@pytest.mark.parametrize(
    "more", [("--part", "1/2"), ("--own", "x"), ("--dtype", "float32"), ("--where", "*: ties(density=0.3)"), ("--delta",),
             ("--how", "ties")]
)  # fmt: skip
def test_beside_a_config_that_says_all_nothing_else_is_told(merganser, models, tmp_path, verb, more):
    config = {"merge_method": "linear", "models": [{"model": str(models["a"]), "parameters": {"weight": 1}}]}
    (tmp_path / "one.yml").write_text(json.dumps(config))
    refused(merganser(verb, "one.yml", "--to", "out", *more), "says all itself", "--part", status=2)
    assert not (tmp_path / "out").exists()


def test_the_config_says_the_dtype_that_was_asked_for(merganser, models, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(models["base"]).bfloat16()
    base.save_pretrained(tmp_path / "narrow")
    for folder, dtype in (("wide", "float32"), ("half", "float16")):
        library.merge(tmp_path / "narrow", [models["a"]], "average", dtype=dtype, into=tmp_path / folder)
        assert str(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).dtype) == f"torch.{dtype}"
    library.merge(tmp_path / "narrow", [models["a"]], "average", into=tmp_path / "same")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "same").dtype == torch.bfloat16


def test_a_check_goes_on_behind_a_pattern_that_cannot_be_read(merganser, models):
    done = merganser("check", models["base"], models["a"], "nowhere", "--how", "ties", "--own", "lm_haed.*",
                     "--where", "*.mlp.*: ties(densty=3)", "--where", "*.mpl.*: ties(density=0.3)", "--json")  # fmt: skip
    assert done.returncode == 1
    said = {one["where"]: one["what"] for one in json.loads(done.stdout)["errors"]}
    assert "nowhere" in said["expert 'nowhere'"]
    assert "did you mean 'density'" in said["--where"]
    assert "*.mpl.*" in said["where"]
    assert "lm_head" in said["own"]
    done = merganser("merge", models["base"], models["a"], "nowhere", "--how", "ties", "--to", models["a"].parent / "no",
                     "--where", "*.mlp.*: ties(densty=3)", "--where", "*.mpl.*: ties(density=0.3)")  # fmt: skip
    assert done.returncode == 1
    assert "did you mean 'density'" in done.stderr
    assert "nowhere" in done.stderr
    assert "*.mpl.*" in done.stderr
    assert not (models["a"].parent / "no").exists()


def test_ingredients_of_other_models_are_seen_before_the_merge(merganser, models, tmp_path):
    for name in ("a", "b"):
        full = {k: v.abs() for k, v in load_file(models[name] / "model.safetensors").items()}
        norm = next(k for k in full if k.endswith("norm.weight"))
        sets = {
            "strange": {"x": torch.ones(3)},
            "uneven": {**full, norm: full[norm][: 5 if name == "a" else 3].clone()},
        }
        for folder, tensors in sets.items():
            (tmp_path / folder / name).mkdir(parents=True)
            save_file(tensors, tmp_path / folder / name / "model.safetensors")
    words = (models["base"], models["a"], models["b"], "--how", "fisher", "--ingredient")
    for verb, more in (("check", ()), ("merge", ("--to", "out"))):
        refused(merganser(verb, *words, "fisher=strange", *more), "none of the merged tensors' names")
        refused(merganser(verb, *words, "fisher=uneven", *more), "[3] and [5]", "norm.weight")
    assert not (tmp_path / "out").exists()


def test_a_stored_delta_is_no_base(models, tmp_path):
    library.merge(models["base"], [models["a"]], "average", stored="delta", into=tmp_path / "d")
    with pytest.raises(MerganserError, match="a stored delta, not a model"):
        library.merge(tmp_path / "d", [models["b"]], "average")


def test_who_is_not_finite_is_named_rightly():
    fine, wrong = {"x": torch.ones(3)}, {"x": torch.tensor([1.0, float("nan"), 1.0])}
    for base, expert, who in ((wrong, wrong, "the base"), (fine, wrong, "expert 'a'")):
        with pytest.raises(MerganserError, match=f"{who} has NaN"):
            library.merge(base, {"a": expert}, "average")
    huge = {"x": torch.full((3,), 3e38)}
    with pytest.raises(MerganserError, match="too large for fp32"):
        library.merge(huge, {"a": {"x": -huge["x"]}}, "average")


@pytest.mark.parametrize(("word", "here"), [("linear", "average"), ("dare_ties", "dare | ties")])
def test_words_of_other_mergers_are_answered_with_ours(merganser, models, word, here):
    refused(merganser("check", models["base"], models["a"], "--how", word), f"unknown step '{word}'", here)


def test_a_gradient_in_a_sentence_is_sent_to_where(merganser, models):
    how = "ties(density={'gradient': [0.2, 0.8]})"
    refused(
        merganser("check", models["base"], models["a"], "--how", how), "a gradient over layers is told for a pattern"
    )


def test_a_folder_that_is_not_there_is_not_taken_for_a_step(merganser):
    refused(merganser("show", "./nowhere"), "no such file or folder")


def test_a_shard_size_is_heard_by_merge_check_and_a_mergekit_yaml(merganser, models, tmp_path):
    words = (models["base"], models["a"], "--how", "average")
    refused(merganser("check", *words, "--to", "out", "--shard-size", "5 apples"), "such as 5GB, 500MB or 2GiB")
    assert merganser("merge", *words, "--to", "out", "--shard-size", "20kB").returncode == 0
    config = {"merge_method": "linear", "models": [{"model": str(models["a"]), "parameters": {"weight": 1}}]}
    (tmp_path / "one.yml").write_text(json.dumps(config))
    refused(merganser("check", "one.yml", "--to", "kit", "--shard-size", "x"), "such as 5GB, 500MB or 2GiB")
    assert merganser("merge", "one.yml", "--to", "kit", "--shard-size", "20kB").returncode == 0
    for folder in ("out", "kit"):
        sizes = {path.name: path.stat().st_size for path in (tmp_path / folder).glob("model-*.safetensors")}
        assert len(sizes) > 1
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)


def test_nan_in_what_is_only_copied_is_named(merganser, models, tmp_path):
    broken = load_file(models["b"] / "model.safetensors")
    name = next(n for n in broken if "layers.1" in n and "proj" in n)
    broken[name][0, 0] = float("nan")
    shutil.copytree(models["b"], tmp_path / "broken")
    save_file(broken, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    slices = [
        {"sources": [{"model": m, "layer_range": r}]} for m, r in ((str(models["a"]), [0, 1]), ("broken", [1, 2]))
    ]
    (tmp_path / "one.yml").write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
    refused(merganser("merge", "one.yml", "--to", "out"), "'broken' has NaN or inf in tensor", name)
    assert not (tmp_path / "out").exists()
    done = merganser("merge", "broken", models["a"], "--how", "average", "--own", name, "--to", "out")
    assert done.returncode == 0
    assert f"warning: tensor '{name}' has NaN or inf in the base, and is copied as it is" in done.stderr
    refused(merganser("merge", "broken", models["a"], "--how", "average", "--to", "again"), "the base has NaN", name)
