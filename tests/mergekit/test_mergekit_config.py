"""What mergekit would accept and ignore is one clear error before any work."""

from pathlib import Path

import pytest
from llamas import families, family, write, write_all

from merganser import check
from merganser.errors import MerganserError, RecipeError, WeightsError
from merganser.mergekit import merge_config, plans

TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1, density: 0.5}}
  - {model: b, parameters: {weight: 1}}
"""
SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
STACK = "merge_method: passthrough\nslices:\n - sources: [{model: a, layer_range: [0, 2]}]\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("models"), family("a", "b"))


def fault(models: Path, text: str) -> str:
    (models / "config.yml").write_text(text)
    with pytest.raises(MerganserError) as caught:
        plans(models / "config.yml")
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(str(models / "config.yml"))
    return said.removeprefix(f"{models / 'config.yml'}: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TIES.replace("density", "densty"), "models[0].parameters: 'ties' has no parameter 'densty' (did you mean"),
        (TIES + "parameters: {normalise: true}", "'ties' has no parameter 'normalise' (did you mean 'normalize'?)"),
        (TIES + "dtpe: float16", "unknown key 'dtpe' (did you mean 'dtype'?)"),
        (TIES.replace("parameters: {weight: 1}", "paramters: {weight: 1}"), "unknown key 'models.1.paramters' (did you mean"),
        (TIES.replace("0.5", "50"), "models[0].parameters.density must lie in [0, 1], got 50"),
        (TIES.replace("0.5", "-3"), "models[0].parameters.density must lie in [0, 1], got -3"),
        (TIES.replace("0.5", "[0.1, 2]"), "models[0].parameters.density must lie in [0, 1], got 2"),
        (TIES.replace("0.5", "[{filter: mlp, value: 7}, {value: 1}]"), "density must lie in [0, 1], got 7"),
        (TIES.replace("0.5", "[{fliter: mlp, value: 1}]"), "unknown key 'fliter'"),
        (TIES.replace("0.5", "[]"), "must be a value, a list of numbers"),
        (TIES.replace("weight: 1,", "weight: lots,"), "models[0].parameters.weight must be a number, got 'lots'"),
        (TIES.replace("weight: 1,", "weight: .nan,"), "models[0].parameters.weight must be a number"),
        (TIES + "parameters: {normalize: maybe}", "parameters.normalize must be true or false, got 'maybe'"),
        (TIES.replace("{weight: 1}", "{density: 1}"), "no weight of 'b' is given for tensor"),
        (TIES.replace(": ties", ": dare-ties"), "unknown merge_method 'dare-ties' (did you mean 'dare_ties'?)"),
        (TIES.replace(": ties", ": della").replace("0.5", "0.9"), "density 0.9 of 'a' needs an epsilon below 0.1, got 0.15"),
        (TIES + "dtype: bflot16", "'dtype': unknown dtype (did you mean 'bfloat16'?)"),
        (TIES.replace("base_model: base", ""), "'ties' needs base_model"),
        (TIES.replace("{model: b", "{model: a"), "'a' is there twice"),
        (TIES.replace("{model: b", "{model: b@main"), "'b@main' is a folder on this machine"),
        (TIES.replace("{model: b", "{model: 3"), "a model is a folder or a name on the Hub, got 3"),
        (TIES + "dtype: float32\ndtype: float16", "'dtype' is there twice"),
        (TIES + ": : [", "not valid YAML, line"),
        ("- a", "not a mergekit config"),
        ("", "not a mergekit config"),
        ("merge_method: ties", "one of models, slices and modules"),
        (TIES + STACK.partition("\n")[2], "one of models, slices and modules"),
        ("base_model: base\nexperts: []", "'experts' belongs to mergekit-moe"),
        (TIES + "tokenizer_source: zz", "zz: no such file or folder"),
        (TIES + "tokenizer_source: base\ntokenizer: {source: base}", "say the same thing"),
        (TIES + "tokenizer: {tokens: {x: {source: a}}}", "the models' folders have no tokenizer"),
        (TIES + "tokenizer: {tokens: {x: {sorce: a}}}", "unknown key 'tokenizer.tokens.x.sorce' (did you mean 'source'?)"),
        (TIES + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}", "{kind, model, token_id}"),
        (TIES + "tokenizer: {tokens: {x: {source: {kind: zero, token: y}}}}", "zero is of no model and no token"),
        (TIES + "chat_template: chatlm", "unknown chat_template 'chatlm' (did you mean 'chatml'?); known: auto, alpaca"),
        (SLERP, "no t is given for tensor"),
        (SLERP + "parameters: {t: 1.5}", "parameters.t must lie in [0, 1], got 1.5"),
        (SLERP.replace(", {model: b}", "") + "parameters: {t: 1}", "'slerp' takes 1 model beside the base, got 0"),
        (STACK.replace("[0, 2]", "[2, 9]"), "slices[0].sources[0]: layer_range [2, 9] is not among the 4 layers of 'a'"),
        (STACK.replace("[0, 2]", "[2, 2]"), "layer_range [2, 2] is not among the 4 layers"),
        (STACK.replace(", layer_range: [0, 2]", ""), "lacks 'slices.0.sources.0.layer_range'"),
        (STACK.replace("]}]", "]}, {model: b, layer_range: [0, 2]}]"), "'passthrough' takes 1 model, got 2"),
        (STACK + "   residual_weight: 0.5", "mergekit reads it and does nothing with it"),
        ("merge_method: linear\nparameters: {weight: 1}\nslices:\n - sources: [{model: a, layer_range: [0, 2]}, "
         "{model: b, layer_range: [0, 1]}]", "different numbers of layers"),
        ("merge_method: slerp\nbase_model: base\nparameters: {t: 1}\nslices:\n - sources: [{model: a, layer_range: [0, 2]}, "
         "{model: b, layer_range: [0, 2]}]", "the base among the sources of every slice"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]",
         "sum to zero and cannot be normalised"),
        ("merge_method: linear\nmodules: {encoder: {models: [{model: a}]}, shared: {models: [{model: a}]}}",
         "modules.encoder: no tensor of 'a' has 'encoder' as a part of its name"),
        ("merge_method: linear\nmodules: {default: {models: [{model: a}]}, shared: {models: [{model: a}]}}",
         "default and shared would each take what the others leave"),
        ("merge_method: linear\nmodules: {layers: {models: [{model: a}], slices: []}, shared: {models: []}}",
         "modules.shared needs either models or slices"),
    ],
)  # fmt: skip
def test_a_fault_is_told_before_work(models: Path, text: str, said: str) -> None:
    assert said in fault(models, text)


def test_all_faults_of_parameters_are_told_at_once(models: Path) -> None:
    said = fault(models, TIES.replace("0.5", "50").replace("{weight: 1}", "{wieght: 1}"))
    assert "density must lie in" in said
    assert "'wieght' (did you mean 'weight'?)" in said


def test_all_missing_models_are_told_at_once(models: Path) -> None:
    said = fault(models, TIES.replace("model: a", "model: ./x1").replace("{model: b", "{model: ./x2"))
    assert "x1" in said
    assert "x2" in said


def test_faults_of_every_kind_are_told_at_once(models: Path) -> None:
    text = """
merge_method: dare-ties
dtype: bflot16
tokenizer: {source: base, tokens: {x: {sorce: a}}}
note: hello
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: b, layer_range: [0, 3]}
  - sources: [{model: a, layer_range: [2, 9]}, {model: ./gone, layer_range: [2, 4]}, {model: a, layer_range: [2, 4]}]
"""
    said = fault(models, text)
    for one in ("unknown merge_method 'dare-ties'", "'dtype': unknown dtype", "tokenizer.tokens.x.sorce", "key 'note'",
                "slices[0]: its sources have different numbers of layers", "slices[1]: 'a' is there twice", "gone",
                "layer_range [2, 9] is not among the 4 layers"):  # fmt: skip
        assert one in said
    found = check(models / "config.yml")
    assert len(found.errors) == 8, found.errors
    said = fault(models, text.replace("dare-ties", "ties").replace("weight: 1", "wieght: 1, density: 2"))
    for one in ("no parameter 'wieght'", "density must lie in [0, 1]", "'ties' needs base_model", "'dtype'", "gone"):
        assert one in said


def test_what_is_missing_for_several_models_is_told_at_once(models: Path) -> None:
    said = fault(models, TIES.replace("weight: 1, ", "").replace("{weight: 1}", "{density: 1}"))
    assert "no weight of 'a' is given" in said
    assert "no weight of 'b' is given" in said


def test_an_unknown_key_explains_what_is_missing_beside_it(models: Path) -> None:
    said = fault(models, TIES.replace("merge_method", "merge_methd"))
    assert "unknown key 'merge_methd' (did you mean 'merge_method'?)" in said
    assert "lacks" not in said


def test_the_faults_have_their_classes(models: Path) -> None:
    with pytest.raises(RecipeError, match="no such config"):
        plans(models / "none.yml")
    (models / "config.yml").write_text(TIES.replace("{model: b", "{model: ./none"))
    with pytest.raises(WeightsError, match="no such file or folder"):
        merge_config(models / "config.yml")


def test_nothing_is_written_where_a_config_is_wrong(models: Path, tmp_path: Path) -> None:
    (models / "config.yml").write_text(TIES.replace("density", "densty"))
    with pytest.raises(RecipeError):
        merge_config(models / "config.yml", into=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_input_is_not_overwritten(models: Path) -> None:
    (models / "config.yml").write_text(TIES)
    with pytest.raises(WeightsError, match="holds an input"):
        merge_config(models / "config.yml", into=models / "a")


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (
            TIES.replace("0.5", '[{filter: "*.mlp.*", value: 1}, {value: 0.5}]'),
            "a filter is a part of a name, without wildcards",
        ),
        (TIES.replace("0.5", "[{filter: mpl, value: 1}, {value: 0.5}]"), "no tensor's name has 'mpl' in it"),
        (TIES + "parameters: {int8_mask: true}", "int8_mask changes nothing here"),
        (TIES.replace(": ties", ": task_arithmetic"), "task_arithmetic has no use for density"),
        (TIES, "ties by mergekit's rules: density is the share of each tensor"),
        (TIES + "dtype: bfloat16", "computed in float32 and rounded to bfloat16 once"),
    ],
)
def test_what_a_reader_should_know_is_noted(models: Path, text: str, note: str) -> None:
    (models / "config.yml").write_text(text)
    assert any(note in said for said in plans(models / "config.yml")[0][0].notes)


def test_other_spellings_are_read(models: Path) -> None:
    (models / "config.yml").write_text(
        f"merge_method: linear\nname: mine\nout_dtype: torch.float16\nparameters: {{weight: '1e-1'}}\n"
        f"models:\n - model: {{model: {{path: a}}, lora: null}}\n - model: {{path: {models / 'b'}}}\n"
    )
    made = plans(models / "config.yml")[0][0]
    assert list(made.models) == ["a", "b"]
    assert made.sentences == {"average(weights={'a': 0.1, 'b': 0.1})": 39}
    assert {kind for kind, _ in made.spec.values()} == {"F16"}


def test_a_module_is_asked_only_of_the_models_that_it_is_merged_of(tmp_path: Path) -> None:
    """An encoder alone may join the encoder of whole models; what belongs to no module is the first model's."""
    models = families()
    write_all(tmp_path, {who: models[who] for who in ("t5", "t5-a")})
    alone = {name: t for name, t in models["t5-b"].items() if name.startswith("encoder.")}
    write(tmp_path / "alone", alone)
    text = """
merge_method: linear
parameters: {weight: 1}
modules:
  encoder: {models: [{model: t5-a}, {model: alone}]}
  decoder: {models: [{model: t5-a}, {model: t5}]}
"""
    (tmp_path / "config.yml").write_text(text)
    made = plans(tmp_path / "config.yml")[0][0]
    assert set(made.origin) == set(models["t5"])
    assert any("of no module, so 't5-a' gives them" in note for note in made.notes)
    assert "modules.decoder: no tensor of 'alone'" in fault(tmp_path, text.replace("{model: t5}", "{model: alone}"))


def test_all_tokens_that_are_not_there_are_told_at_once(tmp_path: Path) -> None:
    write_all(tmp_path, families())
    tokens = (
        "<z>: {source: more}, <x>: {source: plain}, <y>: {source: a}, "
        "t1: {source: {kind: model_token, model: more, token: t99}}, "
        "t2: {source: {kind: model_token, model: more, token_id: 18}}"
    )
    text = f"""
merge_method: task_arithmetic
base_model: plain
models: [{{model: more, parameters: {{weight: 1}}}}]
tokenizer: {{source: union, tokens: {{{tokens}}}}}
"""
    said = fault(tmp_path, text)
    for one in ("'<z>': 'more' lacks the token '<z>'", "'<x>': 'plain' lacks the token '<x>'",
                "'<y>': 'a' is none of the models",
                "'t1': 'more' lacks the token 't99' (did you mean",
                "'t2': 'more' lacks a row 18 (it has 18 rows)"):  # fmt: skip
        assert one in said
