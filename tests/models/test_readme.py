"""The README's lines of Python run as they stand, on tiny models."""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

README = Path(__file__).parents[2] / "README.md"


def test_the_lines_of_python_run(write, tmp_path, monkeypatch, capsys):
    base, _ = write("bert", "BertModel")
    shutil.copytree(base, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    experts = {}
    for k, name in enumerate(("topics", "intents")):
        experts[name] = f"experts/{name}"
        (tmp_path / experts[name]).mkdir(parents=True)
        rng = torch.Generator().manual_seed(k)
        moved = {n: t + 0.02 * torch.randn(t.shape, generator=rng) for n, t in weights.items()}
        save_file(moved, tmp_path / experts[name] / "model.safetensors")
    texts = [f"the {a} {b}" for a in ("cat", "dog", "bird") for b in ("sits", "runs", "fast", "slow")] * 4
    classes = {"topics": ["cat", "dog"], "intents": ["sits", "runs", "slow"]}
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    quick = code.replace("ri | coadapt", "ri(steps=3) | coadapt(steps=3)")
    assert quick != code
    exec(quick, {"experts": experts, "classes": classes, "texts": texts})
    assert float(capsys.readouterr().out) > 0
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    assert len([line for line in code.splitlines() if line.strip()]) == 6
