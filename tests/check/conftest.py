"""A base and experts in folders."""

import subprocess
import sys

import pytest
from tiny_llama import write_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A base and two experts; tests copy what they spoil."""
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, seed) for seed, name in enumerate(("base", "a", "b"))}


@pytest.fixture
def merganser(tmp_path):
    """Run the command line as a user does, in an empty folder; returns exit status, output and errors."""

    def run(*words: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "merganser.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)

    return run
