"""A scale that no label chooses: by how often a merged model says what each expert says, on unlabeled inputs."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from merganser.cli import app
from merganser.prepare import JUDGED_ON, prepare
from merganser.recipe import read_recipe
from merganser.sentence import parse
from merganser.sweep import delta_of, merged_at


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def mine(user, tmp_path):
    """The user's folder, a copy that may be changed."""
    return shutil.copytree(user, tmp_path / "mine")


@pytest.fixture
def unlabelled(mine):
    """The recipe with two mergers, scales of its own, and no validation split anywhere."""
    recipe = (mine / "recipe.toml").read_text()
    recipe = re.sub(r"sentences = \[.*?\]\n", 'sentences = ["task_arithmetic", "ties"]\n', recipe, flags=re.DOTALL)
    recipe = re.sub(r"scales = .*\n", 'scales = [0.2, 0.4, 0.8]\nchoose = "experts"\n', recipe)
    (mine / "free.toml").write_text(recipe)
    for file in mine.glob("tasks/*/val*"):
        file.unlink()
    return mine / "free.toml"


def agreement(ready, model):
    """Return the share of inputs of which a model says what each expert says, the mean over experts."""
    batch, same = ready.judged_on.take(torch.arange(len(ready.judged_on))), []
    for name, expert in ready.experts.items():
        said = (
            ready.heads[name](torch.func.functional_call(ready.encoder, dict(w), (batch,))) for w in (model, expert)
        )
        one, other = (logits.argmax(1) for logits in said)
        same.append((one == other).double().mean().item())
    return np.mean(same)


def test_the_scale_is_the_one_that_agrees_most(unlabelled, tmp_path):
    done = call("run", unlabelled, "--to", tmp_path / "out")
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    ready = prepare(read_recipe(unlabelled))
    assert len(ready.judged_on) == min(JUDGED_ON, len(ready.inputs))
    tuned = [row for row in told["rows"] if row["tuned"]]
    assert len(tuned) == 2
    for row in tuned:
        assert row["consumed"] == ["unlabeled inputs for the scale"]
        delta = delta_of(ready, parse(row["merge"]), ready.experts)
        by_hand = {by: agreement(ready, merged_at(ready, delta, by)) for by in (0.2, 0.4, 0.8)}
        points = next(c["points"] for c in told["curves"] if c["merge"] == row["merge"] and not c["adapt"])
        assert {p["scale"]: p["val"] for p in points} == pytest.approx(by_hand, abs=0.02)
        assert row["scale"] == max(points, key=lambda p: p["val"])["scale"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "chosen by agreement with the experts" in page
    assert "validation data" not in page


def test_labels_and_experts_do_not_share_rows(mine, unlabelled, tmp_path):
    call("run", unlabelled, "--to", tmp_path / "out")
    again = call("run", unlabelled, "--to", tmp_path / "out", "--dry-run", "--json")
    assert all(one["done"] for one in json.loads(again.stdout)["plan"]["stages"])
    before = {p.name: p.read_bytes() for p in (tmp_path / "out" / "rows").iterdir()}
    (mine / "other.toml").write_text(
        unlabelled.read_text().replace('choose = "experts"', "").replace("0.2, 0.4, 0.8", "")
    )
    assert call("run", mine / "other.toml", "--to", tmp_path / "out").exit_code == 0
    after = {p.name: p.read_bytes() for p in (tmp_path / "out" / "rows").iterdir()}
    assert all(before[name] != after[name] for name in ("ties.json", "task-arithmetic.json"))
    assert before["base-and-experts.json"] == after["base-and-experts.json"]


def test_what_is_lacking_is_said_before_any_work(mine, unlabelled, tmp_path):
    text = unlabelled.read_text()
    (mine / "labels.toml").write_text(text.replace('choose = "experts"', ""))
    done = call("run", mine / "labels.toml", "--to", tmp_path / "out")
    assert done.exit_code == 1
    assert 'choose = "experts"' in done.stderr
    start = text.index("[inputs]")
    stop = text.find("\n[", start)
    (mine / "bare.toml").write_text(text[:start] + (text[stop + 1 :] if stop > 0 else ""))
    for more in ((), ("--dry-run", "--json")):
        done = call("run", mine / "bare.toml", "--to", tmp_path / "out", *more)
        assert done.exit_code == 1, done.output
        assert "needs unlabeled inputs" in done.output
    (mine / "typo.toml").write_text(text.replace('"experts"', '"expert"', 1))
    assert call("run", mine / "typo.toml", "--to", tmp_path / "out").exit_code == 1
    assert not (tmp_path / "out").exists()
