"""From a recipe to a ranking of its unlabeled inputs, on the command line."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from merganser.cli import app


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_own_inputs_are_ranked_above_noise(user, tmp_path):
    x = np.load(user / "inputs.npz")["x"]
    np.savez(tmp_path / "noise.npz", x=np.random.default_rng(0).integers(0, 256, x.shape, dtype=np.uint8))
    np.savez(tmp_path / "one.npz", x=np.repeat(x[:1], 20, axis=0))
    more = tmp_path / "one.npz", tmp_path / "noise.npz"
    done = call("sources", user / "recipe.toml", *more, "--few", 40, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [set(one) for one in found] == [{"source", "inputs", "cover", "near"}] * 3
    assert found[0]["source"].endswith("inputs.npz")
    assert found[0]["inputs"] == 40
    assert found[0]["cover"] > found[1]["cover"]
    assert {one["inputs"] for one in found} == {20, 40}


def test_the_table_names_them(user):
    done = call("sources", user / "recipe.toml")
    assert done.exit_code == 0, done.output
    assert "inputs.npz" in done.output.replace("\n", "")
    assert "cover" in done.output


@pytest.mark.parametrize("file", ["absent.npz", "leaves:10"])
def test_a_file_that_is_not_there_is_told(user, file):
    done = call("sources", user / "recipe.toml", file)
    assert done.exit_code == 1
    assert file.split(":")[0] in done.output
