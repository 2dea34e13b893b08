"""RECORDS.md and docs/results say what the results files say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_records_are_what_the_results_give():
    done = subprocess.run([sys.executable, "bench/records.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
