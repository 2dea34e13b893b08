"""Layers are told by names: stacks, slices, gradients, and what config.json says of them."""

import json
from pathlib import Path

import pytest
import torch
from llamas import family, shapes, write, write_all

from merganser.errors import RecipeError, WeightsError
from merganser.mergekit import merge_config, plans
from merganser.mergekit.layers import comes_first, restack, stacks
from merganser.mergekit.settings import Parameter, resolve

NAMES = [
    "h.0.a",
    "h.1.a",
    "h.1.b",
    "h.10.a",
    *(f"model.layers.{i}.mlp.experts.{j}.w" for i in range(3) for j in range(4)),
]


def test_a_stack_is_numbered_without_holes() -> None:
    assert stacks(NAMES) == {"model.layers.": 3}
    assert stacks(["v.0.x", "v.1.x", "t.0.x", "t.1.x", "t.1.y", "t.2.x", "head.0.x"]) == {"t.": 3, "v.": 2}


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("model.embed_tokens.weight", True), ("transformer.wte.weight", True), ("wpe.weight", True),
        ("embeddings.LayerNorm.bias", True), ("bert.embeddings.word_embeddings.weight", True),
        ("transformer.rotary_pos_emb.inv_freq", True), ("tok_embeddings.weight", True), ("gpt_neox.embed_in.weight", True),
        ("embed_out.weight", False), ("lm_head.weight", False), ("model.norm.weight", False),
        ("transformer.ln_f.bias", False), ("pooler.dense.weight", False), ("classifier.weight", False),
        ("cls.predictions.decoder.weight", False),
    ],
)  # fmt: skip
def test_embeddings_come_before_the_layers(name: str, first: bool) -> None:
    assert comes_first(name) is first


def test_gradients_run_over_the_layers() -> None:
    number, flag, count = Parameter("x"), Parameter("x", kind=bool), Parameter("x", kind=int)
    said = {"x": [0, 1, 4]}
    assert [resolve(number, [said], "n", t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 2.5, 4]
    assert [resolve(flag, [{"x": [True, False]}], "n", t) for t in (0, 0.9, 1)] == [True, True, False]
    assert resolve(count, [{"x": [1, 4]}], "n", 0.5) == 2


def test_the_nearest_setting_that_fits_decides() -> None:
    x = Parameter("x", 9.0)
    own, common = (
        {"x": [{"filter": "mlp", "value": 1}]},
        {"x": [{"filter": "attn", "value": 2}, {"filter": "*", "value": 3}]},
    )
    assert [resolve(x, [own, None, common], name, 0) for name in ("mlp.up", "attn.q", "norm")] == [1, 2, 3]
    assert resolve(x, [own, {}], "norm", 0) == 9


def test_config_json_follows_the_layers() -> None:
    one = {"num_hidden_layers": 2, "layer_types": ["full", "sliding"], "other": [1, 2, 3], "hidden_size": 2}
    two = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"]}
    config = {"text_config": json.loads(json.dumps(one)), **json.loads(json.dumps(one))}
    wide, narrow = {"text_config": one, **one}, {"text_config": two, **two}
    restack(config, [(wide, 0), (wide, 1), (narrow, 1), (narrow, 2)], 2)
    for part in (config, config["text_config"]):
        assert part["num_hidden_layers"] == 4
        assert part["layer_types"] == ["full", "sliding", "y", "z"]
        assert part["other"] == [1, 2, 3]
        assert part["hidden_size"] == 2


def test_a_frankenmerge_runs_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    root = write_all(tmp_path, family("a", "b"))
    (root / "stack.yml").write_text(
        "merge_method: passthrough\ndtype: float32\nslices:\n"
        " - sources: [{model: a, layer_range: [0, 3]}]\n - sources: [{model: b, layer_range: [1, 4]}]\n"
    )
    merge_config(root / "stack.yml", into=root / "out")
    model, told = transformers.AutoModelForCausalLM.from_pretrained(root / "out", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert len(model.model.layers) == 6
    a, b = (transformers.AutoModelForCausalLM.from_pretrained(root / who) for who in "ab")
    x = torch.tensor([[1, 5, 3]])
    state = a.model.embed_tokens(x)
    places = a.model.rotary_emb(state, torch.arange(3)[None])
    for layer in [*a.model.layers[:3], *b.model.layers[1:]]:
        out = layer(state, position_embeddings=places, position_ids=torch.arange(3)[None])
        state = out if isinstance(out, torch.Tensor) else out[0]
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, b.lm_head(b.model.norm(state)), rtol=1e-4, atol=1e-4)


def test_old_buffers_that_only_some_have_are_left_out(tmp_path: Path) -> None:
    models = family("a")
    models["a"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    root = write_all(tmp_path, models)
    for base, expert in (("base", "a"), ("a", "base")):
        (root / "c.yml").write_text(
            f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{{model: {expert}, parameters: {{weight: 1}}}}]\n"
        )
        assert set(merge_config(root / "c.yml")) == set(shapes())


def test_tensors_of_one_model_alone_are_noted_and_left_out(tmp_path: Path) -> None:
    models = family("a")
    models["a"]["score.weight"] = torch.ones(2, 8)
    root = write_all(tmp_path, models)
    (root / "c.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    )
    made = plans(root / "c.yml")[0][0]
    assert "'a' has 'score.weight', which the others lack: left out" in made.notes
    assert set(made.spec) == set(shapes())


def test_a_tensor_that_an_expert_lacks_is_an_error(tmp_path: Path) -> None:
    models = family("a")
    del models["a"]["model.layers.2.mlp.up_proj.weight"]
    root = write_all(tmp_path, models)
    (root / "c.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    )
    with pytest.raises(WeightsError, match=r"expert 'a' lacks 'model\.layers\.2\.mlp\.up_proj\.weight'"):
        plans(root / "c.yml")


def test_dtypes_promote_as_in_torch(tmp_path: Path) -> None:
    models = family("a", "b")
    models["a"] = {n: t.half() for n, t in models["a"].items()}
    models["b"] = {n: t.bfloat16() for n, t in models["b"].items()}
    root = write_all(tmp_path, models)
    (root / "c.yml").write_text("merge_method: linear\nparameters: {weight: 0.5}\nmodels: [{model: a}, {model: b}]\n")
    got = merge_config(root / "c.yml")
    want = {n: (t.float() + models["b"][n].float()) / 2 for n, t in models["a"].items()}
    assert all(got[n].dtype == torch.float32 for n in want)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_numbers_that_are_not_floats_are_the_bases(tmp_path: Path) -> None:
    models = family("a")
    for weights in models.values():
        weights["model.position_ids"] = torch.arange(4)
    root = write_all(tmp_path, models)
    (root / "c.yml").write_text(
        "merge_method: linear\nparameters: {weight: 0.5}\ndtype: float16\nmodels: [{model: a}, {model: base}]\n"
    )
    got = merge_config(root / "c.yml", into=root / "out")
    assert torch.equal(got["model.position_ids"], torch.arange(4))
    assert got["model.norm.weight"].dtype == torch.float16


def test_rows_that_differ_ask_for_a_tokenizer(tmp_path: Path) -> None:
    from llamas import wordy

    models = family("a")
    models["a"]["model.embed_tokens.weight"] = torch.randn(17, 8)
    models["a"]["lm_head.weight"] = torch.randn(17, 8)
    for who, rows in (("base", 16), ("a", 17)):
        wordy(write(tmp_path / who, models[who], vocab_size=rows), ["<x>"] if who == "a" else [])
    (tmp_path / "c.yml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: base}, {model: a}]\n"
    )
    with pytest.raises(RecipeError, match="add tokenizer_source: base"):
        plans(tmp_path / "c.yml")
