"""A model named ``model+lora`` is what PEFT makes of it."""

from pathlib import Path

import pytest
import torch
from llamas import family, write_all

from merganser import check
from merganser.errors import MerganserError
from merganser.mergekit import merge_config

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_all(tmp_path_factory.mktemp("models"), family("a", "b", dtype=torch.bfloat16))
    for k, (who, targets) in enumerate({"a": ["q_proj", "down_proj"], "b": ["v_proj"]}.items()):
        torch.manual_seed(k)
        model = transformers.AutoModelForCausalLM.from_pretrained(root / who, dtype=torch.bfloat16)
        config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        tuned = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        tuned.save_pretrained(root / f"lora-{who}")
        tuned.merge_and_unload().save_pretrained(root / f"{who}-merged")
    return root


CONFIG = """
merge_method: ties
base_model: base
models:
  - {model: %s, parameters: {weight: 1, density: 0.5}}
  - {model: %s, parameters: {weight: 0.5}}
"""
SLICES = """
merge_method: passthrough
slices:
  - sources: [{model: %s, layer_range: [0, 3]}]
  - sources: [{model: %s, layer_range: [1, 4]}]
"""


@pytest.mark.parametrize("config", [CONFIG, SLICES])
def test_it_is_the_model_with_the_adapter_merged_into_it(models: Path, tmp_path: Path, config: str) -> None:
    made = {}
    for name, told in (("lora", ("a+lora-a", "b+lora-b")), ("merged", ("a-merged", "b-merged"))):
        (models / "config.yml").write_text(config % told)
        assert check(models / "config.yml", into=tmp_path / name).ok
        made[name] = merge_config(models / "config.yml", into=tmp_path / name)
    assert made["lora"].keys() == made["merged"].keys()
    for name, tensor in made["merged"].items():
        assert made["lora"][name].dtype == tensor.dtype == torch.bfloat16
        torch.testing.assert_close(made["lora"][name].float(), tensor.float(), atol=4e-3, rtol=1e-2)
    written = "{model: a, lora: lora-a}", "{model: {path: b}, lora: {path: lora-b}}"
    (models / "config.yml").write_text(config % written)
    again = merge_config(models / "config.yml")
    assert all(torch.equal(again[name], made["lora"][name]) for name in again)
    (models / "config.yml").write_text(config % ("a", "b"))
    other = merge_config(models / "config.yml")
    assert any(not torch.allclose(other[n].float(), made["lora"][n].float(), atol=4e-2) for n in other)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora")


def test_neither_model_nor_adapter_is_overwritten(models: Path) -> None:
    (models / "config.yml").write_text(CONFIG % ("a+lora-a", "b"))
    for folder in ("a", "lora-a"):
        with pytest.raises(MerganserError, match="holds an input"):
            merge_config(models / "config.yml", into=models / folder)
        assert any("holds an input" in str(one) for one in check(models / "config.yml", into=models / folder).errors)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("a+b", "'a+b': b is no LoRA adapter; write model+adapter"),
        ("lora-a+a", "'lora-a+a': lora-a is an adapter; write model+adapter"),
        ("a+nowhere", "nowhere"),
        ("a+lora-a@main", "'lora-a@main' is a folder on this machine"),
        ("a+lora-a+lora-b", "lora-a+lora-b"),
    ],
)
def test_what_is_no_model_with_an_adapter_is_told(models: Path, told: str, said: str) -> None:
    (models / "config.yml").write_text(CONFIG % (told, "b"))
    with pytest.raises(MerganserError) as caught:
        merge_config(models / "config.yml")
    assert said in str(caught.value)
