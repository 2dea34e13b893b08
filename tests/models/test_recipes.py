"""Whole recipes on Hugging Face folders: classifiers with their own heads, and CLIP with heads from phrases."""

import json

import numpy as np
import pytest
import torch

from merganser.cli import app
from merganser.recipe import read_recipe
from merganser.run import run

TEXTS = ["the cat sits", "a dog runs fast", "red birds on the mat", "blue car", "a photo of a dog", "the bird , slow ."]


def write_tasks(folder, kind, names, classes, splits):
    for name in names:
        task = folder / "tasks" / name
        task.mkdir(parents=True)
        (task / "task.toml").write_text(
            f'name = "{name}"\nkind = "{kind}"\nclasses = {json.dumps(classes)}\ntemplate = "a photo of {{}}"\n'
        )
        for split, write in splits.items():
            write(task / split)


def test_classifiers_split_adapted_merged_and_scored(write, tmp_path):
    import transformers

    base, model = write("bert", "BertModel")
    body = {n: t.clone() for n, t in model.state_dict().items()}
    experts, said = {}, {}
    for k, name in enumerate(("one", "two")):
        folder, expert = write("bert", "BertForSequenceClassification", seed=k + 1, num_labels=3)
        rng = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for n, p in expert.bert.named_parameters():
                p.copy_(body[n] + 0.05 * torch.randn(p.shape, generator=rng))
        expert.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with torch.no_grad():
            logits = expert(
                **tokenizer(TEXTS * 3, padding=True, return_tensors="pt", return_token_type_ids=False)
            ).logits
        experts[name], said[name] = folder, logits.argmax(dim=1)

    def rows(path):
        labels = said[path.parent.name].tolist()
        lines = (json.dumps({"text": t, "label": y}) for t, y in zip(TEXTS * 3, labels, strict=True))
        path.with_suffix(".jsonl").write_text("\n".join(lines))

    write_tasks(tmp_path, "text", experts, ["a", "b", "c"], {"val": rows, "test": rows})
    (tmp_path / "inputs.txt").write_text("\n".join(TEXTS * 10))
    (tmp_path / "recipe.toml").write_text(
        f'sentences = ["task_arithmetic", "ri(steps=8, batch=8, lr=0.001) | task_arithmetic"]\nscales = [0.5, 1.0]\n'
        f'[model]\nbase = {json.dumps(str(base))}\nencoder = "text"\nprecision = "fp32"\n'
        f"[experts]\none = {json.dumps(str(experts['one']))}\ntwo = {json.dumps(str(experts['two']))}\n"
        f'[tasks]\nfolder = "tasks"\n[heads]\nkind = "expert"\n[inputs]\nfiles = ["inputs.txt"]\n'
    )
    run(tmp_path / "recipe.toml", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["experts"]["mean"]["score"] == 1.0, "an expert says with its split head what it says whole"
    merged = transformers.AutoModel.from_pretrained(tmp_path / "out" / "merged", local_files_only=True)
    assert not torch.equal(
        merged.state_dict()["encoder.layer.0.output.dense.weight"], body["encoder.layer.0.output.dense.weight"]
    )


def test_clip_with_heads_from_phrases(write, tmp_path):
    from safetensors.torch import load_file, save_file

    base, _ = write("clip", "CLIPModel")
    whole = load_file(base / "model.safetensors")
    experts = {}
    for k, name in enumerate(("one", "two")):
        experts[name] = tmp_path / "experts" / name
        experts[name].mkdir(parents=True)
        rng = torch.Generator().manual_seed(k)
        moved = {
            n: t + 0.05 * torch.randn(t.shape, generator=rng)
            if n.startswith("vision_model.") and t.is_floating_point()
            else t
            for n, t in whole.items()
        }
        save_file(moved, experts[name] / "model.safetensors", {"format": "pt"})

    def rows(path):
        rng = np.random.default_rng(len(path.name))
        np.savez(
            path.with_suffix(".npz"), x=rng.integers(0, 255, (12, 20, 28, 3)).astype(np.uint8), y=np.arange(12) % 3
        )

    write_tasks(tmp_path, "image", experts, ["cat", "dog", "bird"], {"val": rows, "test": rows})
    np.savez(tmp_path / "inputs.npz", x=np.random.default_rng(0).integers(0, 255, (40, 24, 24, 3)).astype(np.uint8))
    (tmp_path / "recipe.toml").write_text(
        f'sentences = ["ties", "ri(steps=6, batch=8, lr=0.001) | ties"]\nscales = [1.0]\n'
        f'[model]\nbase = {json.dumps(str(base))}\nencoder = "image"\nprecision = "fp32"\n'
        f'[experts]\none = "experts/one"\ntwo = "experts/two"\n'
        f'[tasks]\nfolder = "tasks"\n[inputs]\nfiles = ["inputs.npz"]\n'
    )
    run(read_recipe(tmp_path / "recipe.toml"), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert set(merged) == set(whole), "the text tower travels with the merged vision tower"
    for name in whole:
        assert torch.equal(merged[name], whole[name]) == (
            not name.startswith("vision_model.") or "position_ids" in name
        ), name
    import transformers

    transformers.CLIPModel.from_pretrained(tmp_path / "out" / "merged", local_files_only=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vit.": "vit_."}, "lack"),
        ({"classifier.": "klassifier."}, "holds no classifier"),
    ],
)
def test_a_classifier_that_does_not_fit_is_one_line(write, tmp_path, change, says):
    from safetensors.torch import load_file, save_file
    from typer.testing import CliRunner

    base, _ = write("vit", "ViTModel")
    folder, _ = write("vit", "ViTForImageClassification", num_labels=3)
    weights = load_file(folder / "model.safetensors")
    ((old, new),) = change.items()
    save_file({n.replace(old, new): t for n, t in weights.items()}, folder / "model.safetensors", {"format": "pt"})

    def rows(path):
        np.savez(path.with_suffix(".npz"), x=np.zeros((4, 24, 24, 3), np.uint8), y=np.arange(4) % 3)

    write_tasks(tmp_path, "image", ["one"], ["cat", "dog", "bird"], {"val": rows, "test": rows})
    (tmp_path / "recipe.toml").write_text(
        f'sentences = ["average"]\n[model]\nbase = {json.dumps(str(base))}\nencoder = "image"\n'
        f'[experts]\none = {json.dumps(str(folder))}\n[tasks]\nfolder = "tasks"\n[heads]\nkind = "expert"\n'
    )
    result = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.toml"), "--to", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert says in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1
