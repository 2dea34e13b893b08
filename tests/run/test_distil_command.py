"""`merganser distil`: a model that its own library loads, made once, and what is refused before any work."""

import json

from typer.testing import CliRunner

import merganser
from merganser.cli import app


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_the_command(user, tmp_path):
    recipe, names = user / "recipe.toml", ("stripes", "spots", "corners")
    experts = {name: merganser.open_weights(user / "experts" / name) for name in names}
    merganser.merge(user / "base", experts, "average", into=tmp_path / "merged")
    asked = ("distil", recipe, tmp_path / "merged", "--to", tmp_path / "out", "--steps", 30, "--lr", 0.003)
    plan = json.loads(call(*asked, "--dry-run", "--json").stdout)
    assert [one["stage"] for one in plan["plan"]["stages"]] == [f"distil {tmp_path / 'merged'}"]
    assert not (tmp_path / "out").exists()
    done = call(*asked)
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "card.json").read_text())
    assert told["sentence"] == "average, then distil(steps=30)"
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert call(*asked).exit_code == 0
    assert json.loads((tmp_path / "out" / "card.json").read_text()) == told, "nothing is done twice"
    (tmp_path / "out" / "README.md").unlink()  # as where a kill came before it was written
    assert call(*asked).exit_code == 0
    assert "# Merge of 3 experts" in (tmp_path / "out" / "README.md").read_text()
    scores = json.loads(call("eval", recipe, tmp_path / "merged", tmp_path / "out", "--json").stdout)
    before, after = (scores[str(tmp_path / name)]["mean"]["score"] for name in ("merged", "out"))
    assert after > before
    assert set(merganser.open_weights(tmp_path / "out")) == set(merganser.open_weights(tmp_path / "merged"))
    assert first == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*checkpoint*"))


def test_other_inputs_make_another_model(user, tmp_path):
    recipe = (user / "recipe.toml").read_text()
    merganser.merge(user / "base", [user / "experts" / "spots"], "average", into=tmp_path / "merged")
    made = []
    for limit in (40, 60):
        (user / "fewer.toml").write_text(recipe.replace("[inputs]\n", f"[inputs]\nlimit = {limit}\n"))
        done = call("distil", user / "fewer.toml", tmp_path / "merged", "--to", tmp_path / "out", "--steps", 3)
        assert done.exit_code == 0, done.output
        made.append(json.loads((tmp_path / "out" / "card.json").read_text()))
    assert made[0]["key"] != made[1]["key"]
    assert made[0]["unlabeled"] != made[1]["unlabeled"]


def test_what_is_refused_before_any_work(user, tmp_path):
    recipe = user / "recipe.toml"
    merganser.merge(user / "base", [user / "experts" / "spots"], "average", into=tmp_path / "merged")
    for to, model, says in (
        (tmp_path / "merged", tmp_path / "merged", "holds an input"),
        (tmp_path / "out", tmp_path / "gone", "gone"),
    ):
        for more in ((), ("--dry-run", "--json")):
            done = call("distil", recipe, model, "--to", to, *more)
            assert done.exit_code == 1, done.output
            assert says in " ".join(done.output.split())
    text = recipe.read_text()
    start = text.index("[inputs]")
    stop = text.find("\n[", start)
    (user / "bare.toml").write_text(text[:start] + (text[stop + 1 :] if stop > 0 else ""))
    done = call("distil", user / "bare.toml", tmp_path / "merged", "--to", tmp_path / "out")
    assert done.exit_code == 1
    assert "needs unlabeled inputs" in done.output
    assert not (tmp_path / "out").exists()
