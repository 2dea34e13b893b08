"""The command line runs a config, and what it writes tells how it came to be."""

import json
from pathlib import Path

import pytest
from chats import rendered
from llamas import family, write, write_all
from typer.testing import CliRunner

from merganser.cli import app
from merganser.mergekit import merge_config

TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1, density: [0.5, 1]}}
  - {model: b, parameters: {weight: 1}}
dtype: bfloat16
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_all(tmp_path, family("a", "b"))
    (tmp_path / "config.yml").write_text(TIES)
    return tmp_path


def test_the_command_merges_and_says_whose_rules_it_keeps(models: Path) -> None:
    done = CliRunner().invoke(app, ["merge", str(models / "config.yml"), "--to", str(models / "out")])
    assert done.exit_code == 0, done.output
    assert "ties by mergekit's rules: density is the share of each tensor (the paper: of the model)" in done.output
    card = json.loads((models / "out" / "card.json").read_text())
    assert card["mergekit"]["method"] == "ties"
    assert card["mergekit"]["models"] == {"base": "base", "a": "a", "b": "b"}
    assert sum(one["tensors"] for one in card["mergekit"]["sentences"]) == 39
    assert card["sentence"] in [one["sentence"] for one in card["mergekit"]["sentences"]]
    readme = (models / "out" / "README.md").read_text()
    assert "mergekit's `ties`" in readme
    assert "mergekit_config.yml" in readme
    assert (models / "out" / "mergekit_config.yml").read_text() == TIES
    assert json.loads((models / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("text", "models_told"),
    [
        (TIES, {"base", "a", "b"}),
        ("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: base}, {model: a}]\n", {"base-model", "a"}),
    ],
)
def test_the_card_has_the_fingerprint_of_every_model(models: Path, text: str, models_told: set[str]) -> None:
    (models / "config.yml").write_text(text)
    merge_config(models / "config.yml", into=models / "out")
    told = json.loads((models / "out" / "card.json").read_text())["inputs"]
    assert set(told) == models_told
    merge_config(models / "config.yml", into=models / "again")
    assert json.loads((models / "again" / "card.json").read_text())["inputs"] == told


def test_slices_of_one_model_are_one_input(models: Path) -> None:
    text = "merge_method: linear\nparameters: {weight: 1}\nslices:\n" + "".join(
        f" - sources: [{{model: a, layer_range: [{k}, {k + 2}]}}, {{model: b, layer_range: [0, 2]}}]\n" for k in (0, 2)
    )
    told = []
    for change in (False, True):
        if change:  # of the first slice alone
            weights = family("a", "b")["a"]
            weights["model.layers.0.mlp.up_proj.weight"] += 1
            write(models / "a", weights)
        (models / "config.yml").write_text(text)
        merge_config(models / "config.yml", into=models / "out")
        told.append(json.loads((models / "out" / "card.json").read_text())["inputs"])
    assert set(told[0]) == {"a", "b"}
    assert told[0]["a"] != told[1]["a"]
    assert told[0]["b"] == told[1]["b"]


def test_a_wrong_config_ends_with_one_line(models: Path) -> None:
    (models / "config.yml").write_text(TIES.replace("density", "densty"))
    done = CliRunner().invoke(app, ["merge", str(models / "config.yml"), "--to", str(models / "out")])
    assert done.exit_code == 1
    assert "did you mean 'density'?" in done.output
    assert not (models / "out").exists()


def test_a_second_merge_replaces_the_first_whole(models: Path) -> None:
    from merganser.weights.stored import Stored

    out = models / "out"
    merge_config(models / "config.yml", into=out)
    (models / "config.yml").write_text(
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 3]}]}]\n"
    )
    merge_config(models / "config.yml", into=out)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    assert {name.split(".")[2] for name in Stored(out) if "layers" in name} == {"0", "1"}


CHATS = json.loads((Path(__file__).parents[1] / "golden" / "chat_templates.json").read_text())
SPACED = {  # as those models were trained
    "alpaca": (
        "### Instruction:\nHi\nthere",
        "Be brief.\n\n### Instruction:\nHi\nthere\n\n### Response:\n",
    ),
    "exaone": (
        "[|system|][|endofturn|]\n[|user|] Hi\nthere \n",
        "[|system|] Be brief. [|endofturn|]\n[|user|] Hi\nthere \n[|assistant|]",
    ),
    "llama3": (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi\nthere<|eot_id|>",
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi\nthere<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("name", list(CHATS))
def test_a_chat_template_by_name_says_what_mergekits_says(models: Path, name: str) -> None:
    """What mergekit's templates make of conversations; three of them run words together or apart, and ours do not."""
    (models / "config.yml").write_text(f"{TIES}chat_template: {name}\n")
    merge_config(models / "config.yml", into=models / "out")
    ours, theirs = rendered((models / "out" / "chat_template.jinja").read_text()), CHATS[name]
    if name in ("chatml", "mistral"):
        assert ours == theirs
    assert {k: "".join(v.split()) for k, v in ours.items()} == {k: "".join(v.split()) for k, v in theirs.items()}
    assert (ours["asked"], ours["told+"]) == SPACED.get(name, (ours["asked"], ours["told+"]))


def test_a_chat_template_is_put_beside_the_weights(models: Path) -> None:
    for who in ("a", "b"):
        (models / who / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (models / "base" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ other }}", "pad": "x"}))
    for asked in ("auto", json.dumps(TEMPLATE)):
        (models / "config.yml").write_text(f"{TIES}chat_template: {asked}\n")
        merge_config(models / "config.yml", into=models / "out")
        assert (models / "out" / "chat_template.jinja").read_text() == TEMPLATE
        assert json.loads((models / "out" / "tokenizer_config.json").read_text()) == {"pad": "x"}


def test_an_empty_target_is_not_the_folder_one_is_in(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models / "a")
    before = sorted(Path().iterdir())
    for verb in (
        ["merge", "../config.yml"],
        ["merge", "../base", "../b", "--how", "average"],
        ["demo"],
        ["report", "x"],
    ):
        done = CliRunner().invoke(app, [*verb, "--to", ""])
        assert done.exit_code == 2
        assert "is empty: name a folder" in " ".join(done.output.split())
    assert sorted(Path().iterdir()) == before
