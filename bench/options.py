"""The options that studies of a suite outside `merganser bench` have in common."""

import argparse
from pathlib import Path


def options(about: str | None, *, seeds: int) -> argparse.ArgumentParser:
    """Return a parser of --data (the tasks), --to (where runs lie), --out (the results file) and --seeds."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="A folder of tasks.")
    parser.add_argument(
        "--to", type=Path, required=True, help="A folder for runs; what is done there is not done again."
    )
    parser.add_argument("--out", type=Path, required=True, help="The file for the results.")
    parser.add_argument("--seeds", type=int, default=seeds, help="How many.")
    return parser
