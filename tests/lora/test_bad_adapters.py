"""Adapters that cannot be merged, or not with this base: one line that names the tensor, from merge and check alike."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from nets import LINEAR, base, by_hand, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import merganser
from merganser.check import check
from merganser.cli import app
from merganser.errors import WeightsError


@pytest.fixture
def made(tmp_path: Path) -> Path:
    base(tmp_path / "base")
    by_hand(tmp_path / "one", LINEAR)
    return tmp_path


def config(folder: Path, **changed: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def tensors(folder: Path, **changed: Tensor | None) -> None:
    path = folder / "adapter_model.safetensors"
    told = {**load_file(path), **changed}
    save_file({name: tensor for name, tensor in told.items() if tensor is not None}, path)


A, B = (f"base_model.model.layers.0.q_proj.lora_{x}.weight" for x in "AB")
FAULTS = {
    "another kind": (lambda f: config(f, peft_type="IA3"), ["IA3", "only LORA"]),
    "a prompt": (lambda f: config(f, peft_type="PROMPT_TUNING"), ["PROMPT_TUNING"]),
    "no kind": (lambda f: (f / "adapter_config.json").write_text("{}"), ["type None"]),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("["), ["cannot be read as the config"]),
    "rank 0": (lambda f: config(f, r=0), ["r = 0", "at least 1"]),
    "rank of a pattern": (lambda f: config(f, rank_pattern={"q_proj": 0}), ["layers.0.q_proj", "rank 0"]),
    "rank of other tensors": (lambda f: config(f, r=3), [A, "[2, 8]", "rank 3"]),
    "a broken pattern": (lambda f: config(f, alpha_pattern={"(": 3}), ["alpha_pattern", "'('"]),
    "no lora_B": (lambda f: tensors(f, **{B: None}), [A, "without its lora_B"]),
    "no lora_A": (lambda f: tensors(f, **{A: None}), [B, "without its lora_A"]),
    "half of it": (lambda f: tensors(f, **{B: torch.zeros(6, 1)}), [B, "[6, 1]", "rank 2"]),
    "another shape": (lambda f: tensors(f, **{B: torch.zeros(7, 2)}), ["layers.0.q_proj.weight", "[6, 8]", "[7, 8]"]),
    "another base": (
        lambda f: by_hand(f, {**LINEAR, "layers.7.k_proj": (6, 8)}),
        ["layers.7.k_proj.weight", "the base does not have", "another base"],
    ),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors", "neither"]),
    "no tensors": (lambda f: save_file({}, f / "adapter_model.safetensors"), ["holds no tensors"]),
    "more than LoRA": (
        lambda f: tensors(f, **{"base_model.model.q.token_adapter.trainable_tokens_delta": torch.zeros(2)}),
        ["trainable_tokens_delta"],
    ),
    "aLoRA": (lambda f: config(f, alora_invocation_tokens=[1, 2]), ["alora_invocation_tokens", "merge_and_unload"]),
    "parameters": (lambda f: config(f, target_parameters=["experts.up"]), ["target_parameters"]),
    "a new head": (
        lambda f: tensors(f, **{"base_model.model.score.weight": torch.zeros(2, 8)}),
        ["score.weight", "the base lacks", "own="],
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_it_is_told_in_one_line(made: Path, fault: str) -> None:
    spoil, words = FAULTS[fault]
    spoil(made / "one")
    with pytest.raises(WeightsError) as raised:
        merganser.merge(made / "base", [made / "one"], "average", into=made / "out")
    told = str(raised.value)
    assert "\n" not in told
    for word in words:
        assert word in told
    found = check(made / "base", [made / "one"], "average", into=made / "out")
    assert len(found.errors) == 1
    assert not (made / "out").exists()
    for arguments in (["check"], ["merge", "--dry-run"]):
        done = CliRunner().invoke(
            app, [arguments[0], str(made / "base"), str(made / "one"), "--how", "average", "--json", *arguments[1:]]
        )
        assert done.exit_code == 1
        assert words[0].replace("'", "") in done.stdout.replace("\\", "").replace("'", "")


def test_not_a_number_is_named(made: Path) -> None:
    spoiled = load_file(made / "one" / "adapter_model.safetensors")[B]
    spoiled[0, 0] = torch.nan
    tensors(made / "one", **{B: spoiled})
    for how in ("average", "ties", "knots | ties"):
        with pytest.raises(WeightsError, match=r"expert 'one' has NaN or inf in tensor 'layers.0.q_proj.weight'"):
            merganser.merge(made / "base", [made / "one"], how)


def test_the_name_of_another_base_is_a_warning(made: Path) -> None:
    config(made / "one", base_model_name_or_path="org/other")
    with pytest.warns(UserWarning, match="says its base is 'org/other'"):
        merganser.merge(made / "base", [made / "one"], "average")
    found = check(made / "base", [made / "one"], "average")
    assert found.ok
    assert "org/other" in found.warnings[0].what
    for name in ("somewhere/base", "base", str(made / "base"), "org/Base", None):
        config(made / "one", base_model_name_or_path=name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merganser.merge(made / "base", [made / "one"], "average")


def test_an_adapter_is_no_base_and_is_not_written_over(made: Path) -> None:
    with pytest.raises(WeightsError, match="is an adapter"):
        merganser.merge(made / "one", [made / "one"], "average")
    with pytest.raises(WeightsError, match="holds an input"):
        merganser.merge(made / "base", [made / "one"], "average", into=made / "one")


def test_a_square_module_among_both_ways_of_lying_is_not_guessed(made: Path) -> None:
    modules = {"a": (6, 8), "b": (8, 6), "c": (8, 8)}
    by_hand(made / "one", modules)
    told = {"a.weight": torch.zeros(6, 8), "b.weight": torch.zeros(6, 8), "c.weight": torch.zeros(8, 8)}
    with pytest.raises(WeightsError, match=r"'c.weight' is square"):
        merganser.merge(told, [made / "one"], "average")
    del told["c.weight"]
    by_hand(made / "one", {"a": (6, 8), "b": (8, 6)})
    assert merganser.merge(told, [made / "one"], "average")["b.weight"].any()


@pytest.mark.parametrize("prefix", ["model.", "a.b."])
def test_a_prefix_that_one_side_has_is_seen_through(made: Path, prefix: str) -> None:
    origin = merganser.open_weights(made / "base")
    plain = merganser.merge(made / "base", [made / "one"], "average")
    longer = {prefix + name: tensor for name, tensor in origin.items()}
    ours = merganser.merge(longer, [made / "one"], "average")
    assert all(torch.equal(ours[prefix + name], plain[name]) for name in plain)
    if prefix == "model.":
        by_hand(made / "long", {prefix + name: shape for name, shape in LINEAR.items()})
        ours = merganser.merge(made / "base", [made / "long"], "average")
        assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_what_is_shown_of_an_adapter(made: Path) -> None:
    done = CliRunner().invoke(app, ["show", str(made / "one")])
    assert done.exit_code == 0, done.output
    assert "r 2" in done.output
    assert "modules 3" in done.output
    found = json.loads(CliRunner().invoke(app, ["ls", str(made), "--json"]).stdout)
    assert {Path(one["path"]).name: one["kind"] for one in found} == {"base": "model", "one": "adapter"}


def test_a_full_model_takes_the_place_of_an_adapter(made: Path) -> None:
    by_hand(made / "out", LINEAR, seed=3)
    merganser.merge(made / "base", [made / "one"], "average", into=made / "out")
    assert not (made / "out" / "adapter_config.json").exists()
    assert not (made / "out" / "adapter_model.safetensors").exists()


def test_tensors_that_no_adapter_touches_are_not_read_per_expert(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from merganser.weights.adapter import Adapted

    asked: list[str] = []
    plain = Adapted.__getitem__
    monkeypatch.setattr(Adapted, "__getitem__", lambda self, name: (asked.append(name), plain(self, name))[1])
    merganser.merge(made / "base", [made / "one", by_hand(made / "two", LINEAR, seed=1)], "ties", into=made / "out")
    assert asked == []


def test_ends_of_the_file_itself_and_of_other_spellings(made: Path) -> None:
    plain = merganser.merge(made / "base", [made / "one"], "average")
    by_file = merganser.merge(made / "base", [made / "one" / "adapter_model.safetensors"], "average")
    told = load_file(made / "one" / "adapter_model.safetensors")
    named = {k.replace(".weight", ".default.weight"): t for k, t in told.items()}
    write(made / "named", named, json.loads((made / "one" / "adapter_config.json").read_text()))
    by_name = merganser.merge(made / "base", [made / "named"], "average")
    for name in plain:
        assert torch.equal(plain[name], by_file[name])
        assert torch.equal(plain[name], by_name[name])
