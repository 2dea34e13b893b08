"""RECORDS.md and docs/results say what the results files say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_records_are_what_the_results_give():
    done = subprocess.run([sys.executable, "bench/records.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_figure_of_a_record_is_the_one_that_report_draws(tmp_path):
    import shutil

    from typer.testing import CliRunner

    from merganser.cli import app

    shutil.copyfile(ROOT / "docs" / "results" / "text.json", tmp_path / "scores.json")
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--figure", str(tmp_path / "gains.svg")])
    assert done.exit_code == 0, done.output
    drawn = (tmp_path / "gains.svg").read_text()
    assert all(name in drawn for name in ("task_arithmetic", "iso_c", "experts"))
