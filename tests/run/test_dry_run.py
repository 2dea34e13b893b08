"""`--dry-run` of every command that works for long or writes: what it would do, all that prevents it, nothing written."""

import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

import merganser
from merganser.cli import app

INSTANT = {"check", "ls", "show"}  # they say what there is


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def plan(*args):
    done = call(*args, "--dry-run", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == (0 if told["ok"] else 1), done.output
    return told


def commands():
    return {c.name or c.callback.__name__ for c in app.registered_commands}


@pytest.mark.parametrize("name", sorted(commands() - INSTANT))
def test_every_command_that_works_for_long_has_one(name):
    assert "--dry-run" in re.sub(r"\x1b\[[0-9;]*m", "", call(name, "--help").stdout)


def test_learn_says_what_it_would_measure_and_all_that_is_wrong(user, tmp_path):
    to = tmp_path / "f"
    told = plan("learn", "fisher", user / "recipe.toml", "--to", to)
    assert [one["stage"] for one in told["plan"]["stages"]] == [
        f"measure fisher of {name}" for name in ("stripes", "spots", "corners")
    ]
    told = plan("learn", "coefficients", user / "recipe.toml", "--to", to)
    assert [one["stage"] for one in told["plan"]["stages"]] == ["learn coefficients"]
    told = plan("learn", "surgery", user / "recipe.toml", "--to", to, "--model", user / "experts" / "spots")
    assert [one["stage"] for one in told["plan"]["stages"]] == ["learn surgery"]
    broken = user / "broken.toml"
    broken.write_text((user / "recipe.toml").read_text().replace("experts/spots", "experts/nowhere"))
    told = plan("learn", "fishr", broken, "--to", to)
    assert {one["where"] for one in told["errors"]} == {"expert 'spots'", "what"}
    assert "did you mean 'fisher'" in json.dumps(told["errors"])
    assert not to.exists()


@pytest.mark.parametrize("verb", ["eval", "diagnose"])
def test_eval_and_diagnose_look_at_every_model(user, tmp_path, verb):
    told = plan(verb, user / "recipe.toml", user / "experts" / "spots")
    assert len(told["plan"]["stages"]) == 1
    other = dict(merganser.open_weights(user / "base"))
    other["out.weight"] = other["out.weight"][:2].clone()
    merganser.save(other, tmp_path / "narrow", {})
    merganser.save({"x": other["out.weight"]}, tmp_path / "strange", {})
    told = plan(verb, user / "recipe.toml", tmp_path / "narrow", tmp_path / "strange", tmp_path / "gone")
    said = [(one["where"], one["what"]) for one in told["errors"]]
    assert [where for where, _ in said] == [f"model '{tmp_path / name}'" for name in ("narrow", "strange", "gone")]
    assert "'out.weight' is [2, 128]" in said[0][1]


def test_sources_looks_for_its_files(user):
    assert len(plan("sources", user / "recipe.toml", "dead-leaves:20")["plan"]["stages"]) == 2
    told = plan("sources", user / "recipe.toml", "nowhere.npz", "dead-leafs:20")
    assert [one["where"] for one in told["errors"]] == ["inputs", "inputs"]
    assert "nowhere.npz" in told["errors"][0]["what"]


def test_join_says_which_parts_there_are_and_which_are_missing(user, tmp_path):
    base, experts = user / "base", [user / "experts" / name for name in ("stripes", "spots")]
    for k in (1, 2):
        told = plan("join", tmp_path / "out")
        assert not told["ok"]
        merganser.merge(base, experts, "average", into=tmp_path / "out", part=(k, 2))
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    told = plan("join", tmp_path / "out")
    assert [one["stage"] for one in told["plan"]["stages"]] == [f"join part-0000{k}-of-00002" for k in (1, 2)]
    assert told["plan"]["sentence"] == "average"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before
    assert call("join", tmp_path / "out").exit_code == 0
    assert np.array_equal(
        merganser.open_weights(tmp_path / "out")["out.weight"],
        merganser.merge(base, experts, "average")["out.weight"],
    )


def test_a_study_is_told_with_its_own_mergers_and_ri(tmp_path):
    told = plan("bench", "text", "--study", "proxy", "--ri", "ri(steps=7)", "--to", tmp_path / "out")["plan"]
    assert told["study"].startswith("proxy: ")
    assert "steps=7" in told["ri"]
    assert told["sentences"] == ["task_arithmetic", "ties", "tsv", "iso_c"]
    told = plan("bench", "text", "--study", "proxy", "--how", "ri | ties", "--to", tmp_path / "out")
    assert "a study adapts by itself" in told["errors"][0]["what"]
    (tmp_path / "data" / "agnews").mkdir(parents=True)
    told = plan("bench", "text", "--data", tmp_path / "data", "--study", "proxy", "--to", tmp_path / "out")
    assert any("aux" in one["what"] for one in told["errors"]), "a study adapts, whatever its mergers"
    assert not (tmp_path / "out").exists()


def test_a_report_on_what_is_no_run_is_told(tmp_path):
    told = plan("report", tmp_path / "nowhere", tmp_path)
    assert not told["ok"]
    assert len(told["errors"]) == 2
    assert not list(tmp_path.iterdir())
