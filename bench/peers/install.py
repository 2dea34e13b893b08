"""Make the peers' own environments, one folder each.

    python bench/peers/install.py --to PEERS

torch comes first and alone, so that a peer's own requirement does not bring another build. Where pip would take a CUDA
build of it, put the CPU build into PEERS/NAME by hand first; what is installed is kept.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent


def install(name: str, to: Path) -> Path:
    folder = to / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    lines = (HERE / f"{name}.txt").read_text().split()
    for wanted in (lines[:1], lines):
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    build = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__, torch.version.cuda or 'cpu')"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    if not build.endswith("cpu"):
        print(f"{folder}: torch is {build}: its import costs more than the CPU build's", file=sys.stderr)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["mergekit", "fusion_bench", "peft"])
    parser.add_argument("--to", type=Path, required=True)
    told = parser.parse_args()
    for name in told.names:
        print(install(name, told.to))


if __name__ == "__main__":
    main()
