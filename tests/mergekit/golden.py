"""Make the golden numbers: ``MERGEKIT_PYTHON=... python tests/mergekit/golden.py`` (mergekit 0.1.5, torch 2.13.0)."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from llamas import families, write_all
from safetensors.torch import load_file, save_file

CONFIGS = Path(__file__).parent / "configs"
STORED = ("base", "a", "b", "c", "more", "other", "third", "t5", "t5-a", "t5-b")
LEFT_OUT = ("gate_proj.weight", "up_proj.weight", "v_proj.weight")  # to keep the file small
TOLD = ("num_hidden_layers", "num_layers", "num_decoder_layers", "vocab_size", "dtype")
GOLDEN = Path(__file__).parents[1] / "golden" / "mergekit_yaml.safetensors"


def run(root: Path, python: str) -> Path:
    """Let mergekit merge every config with the models in ``root``; return where its merges lie."""
    oracle = Path(__file__).with_name("oracle.py")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, oracle, root, *sorted(CONFIGS.glob("*.yml"))], check=True, env=offline, capture_output=True)
    return root / "out"


def chats(python: str) -> str:
    """Return what mergekit's own chat templates make of our conversations, as JSON."""
    find = "from importlib.resources import files; print(files('mergekit._data.chat_templates'))"
    folder = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True).stdout.strip()
    script = Path(__file__).with_name("chats.py")
    return subprocess.run([python, script, folder], check=True, capture_output=True, text=True).stdout


def main() -> None:
    GOLDEN.with_name("chat_templates.json").write_text(chats(os.environ["MERGEKIT_PYTHON"]))
    with tempfile.TemporaryDirectory() as folder:
        models = families()
        out = run(write_all(Path(folder), models), os.environ["MERGEKIT_PYTHON"])
        tensors = {f"inputs/{who}/{n}": t.clone() for who in STORED for n, t in models[who].items()}
        told = {}
        for case in sorted(path.name for path in out.iterdir()):
            made = load_file(out / case / "model.safetensors")
            tensors |= {f"{case}/{n}": t for n, t in made.items() if not n.endswith(LEFT_OUT)}
            config = json.loads((out / case / "config.json").read_text())
            told[case] = {key: config[key] for key in TOLD if key in config}
            told[case]["tensors"] = len(made)
    save_file(tensors, GOLDEN)
    GOLDEN.with_suffix(".json").write_text(json.dumps({"mergekit": "0.1.5", "cases": told}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
