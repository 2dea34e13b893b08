"""A recipe whose experts are LoRA adapters: run, check, eval and a second run that does nothing again."""

import json
import re
import shutil

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import merganser
from merganser.cli import app


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def adapter_of(folder, base, rank=8):
    """Put in the place of an expert the adapter that comes nearest to it in its last layer."""
    delta = merganser.open_weights(folder)["out.weight"] - base["out.weight"]
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    shutil.rmtree(folder)
    folder.mkdir()
    low = {"A": vh[:rank].contiguous(), "B": (u[:, :rank] * s[:rank]).contiguous()}
    save_file(
        {f"base_model.model.out.lora_{x}.weight": t for x, t in low.items()}, folder / "adapter_model.safetensors"
    )
    told = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["out"]}
    (folder / "adapter_config.json").write_text(json.dumps(told))


def test_a_recipe_of_adapters(user, tmp_path):
    folder = tmp_path / "user"
    shutil.copytree(user, folder)
    base = merganser.open_weights(folder / "base")
    for name in ("stripes", "spots", "corners"):
        adapter_of(folder / "experts" / name, base)
    text = (folder / "recipe.toml").read_text()
    sentences = '["knots | ties(density=0.5)", "ri(steps=5, lr=0.003, batch=32) | average"]'
    (folder / "recipe.toml").write_text(
        re.sub(r"sentences = \[.*?\n\]", f"sentences = {sentences}", text, flags=re.S).replace("[0.4, 0.8]", "[]")
    )
    checked = call("run", folder / "recipe.toml", "--to", tmp_path / "out", "--dry-run")
    assert checked.exit_code == 0, checked.output
    done = call("run", folder / "recipe.toml", "--to", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert len([row for row in told["rows"] if "|" in row["sentence"]]) == 2
    again = call("run", folder / "recipe.toml", "--to", tmp_path / "out", "--json")
    assert again.exit_code == 0, again.output
    scored = call("eval", folder / "recipe.toml", folder / "experts" / "spots", "--json")
    assert scored.exit_code == 0, scored.output
    one = next(iter(json.loads(scored.stdout).values()))
    assert one["tasks"]["spots"]["score"] > 0.5
    merged = merganser.merge(folder / "base", {n: folder / "experts" / n for n in ("stripes", "spots")}, "average")
    assert torch.equal(merged["conv.weight"], base["conv.weight"])
