"""From recipe to ingredients to a run that uses them, on the command line."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import merganser
from merganser.adapt import slug
from merganser.cli import app


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.mark.parametrize(("what", "step"), [("fisher", "fisher"), ("gram", "regmean"), ("inputs", "esm")])
def test_what_is_measured_is_what_a_run_takes(user, tmp_path, what, step):
    recipe = (user / "recipe.toml").read_text()
    start = recipe.index("sentences = ["), recipe.index("]\n", recipe.index("sentences = [")) + 2
    recipe = recipe[: start[0]] + f'sentences = ["{step}"]\n' + recipe[start[1] :]
    other = user / f"{what}.toml"
    other.write_text(recipe)  # whose sentence needs what is still to be learned
    done = call("learn", what, other, "--to", tmp_path / what, "--rows", 24, "--json")
    assert done.exit_code == 0, done.output
    folders = json.loads(done.stdout)[what]
    assert set(folders) == {"stripes", "spots", "corners"}
    measured = {name: merganser.open_weights(folder) for name, folder in folders.items()}
    assert all("out.weight" in weights for weights in measured.values())

    other.write_text(f'{recipe}\n[ingredients]\n{what} = "{tmp_path / what}"\n')
    done = call("run", other, "--to", tmp_path / "out")
    assert done.exit_code == 0, done.output
    merged = merganser.open_weights(tmp_path / "out" / "merged")
    base = merganser.open_weights(user / "base")
    names = ("stripes", "spots", "corners")
    experts = {name: merganser.open_weights(user / "experts" / name) for name in names}
    row = json.loads((tmp_path / "out" / "scores.json").read_text())["rows"][0]
    assert row["sentence"].startswith(step)
    want = merganser.merge(base, experts, row["sentence"], ingredients={what: measured})
    best = json.loads((tmp_path / "out" / "merged" / "card.json").read_text())["sentence"]
    if best == row["sentence"]:
        torch.testing.assert_close(merged["out.weight"], want["out.weight"])
    average = merganser.merge(base, experts, "average")
    assert not torch.allclose(want["out.weight"], average["out.weight"])


@pytest.mark.parametrize(("what", "step"), [("fisher", "fisher"), ("gram", "regmean"), ("inputs", "esm")])
def test_a_run_measures_what_its_steps_need(user, tmp_path, what, step):
    """The same as handing it over, for experts as they are; for adapted ones it is measured of those. Once."""
    recipe = (user / "recipe.toml").read_text()
    start = recipe.index("sentences = ["), recipe.index("]\n", recipe.index("sentences = [")) + 2
    adapted = f"ri(steps=3, batch=16) | {step}"
    recipe = recipe[: start[0]] + f'sentences = ["{step}", "{adapted}"]\n' + recipe[start[1] :]
    plain, given = user / "plain.toml", user / "given.toml"
    plain.write_text(recipe)
    assert call("run", plain, "--to", tmp_path / "x", "--dry-run").exit_code == 0
    assert call("learn", what, plain, "--to", tmp_path / what).exit_code == 0
    given.write_text(f'{recipe}\n[ingredients]\n{what} = "{tmp_path / what}"\n')
    rows = {}
    for path in (plain, given):
        done = call("run", path, "--to", tmp_path / path.stem)
        assert done.exit_code == 0, done.output
        told = json.loads((tmp_path / path.stem / "scores.json").read_text())["rows"]
        rows[path.stem] = {(row["sentence"], row["tuned"]): row for row in told}
    for key, row in rows["given"].items():
        assert row["consumed"][0] == f"{what} (ingredient)"
        assert rows["plain"][key]["consumed"][0] == f"{what} (up to 256 unlabeled inputs a task)"
        if not row["adapt"]:
            assert row["mean"] == rows["plain"][key]["mean"]
    held = tmp_path / "plain" / "ingredients"
    own, others = (held / name / what for name in ("experts", slug("ri(steps=3, batch=16)")))
    same = {n: merganser.open_weights(own / "spots")[n] for n in merganser.open_weights(own / "spots")}
    assert all(torch.equal(t, merganser.open_weights(tmp_path / what / "spots")[n]) for n, t in same.items())
    assert any(not torch.equal(t, merganser.open_weights(others / "spots")[n]) for n, t in same.items())

    before = {p: p.stat().st_mtime_ns for p in held.rglob("*.safetensors")}
    shutil.rmtree(tmp_path / "plain" / "rows")
    assert call("run", plain, "--to", tmp_path / "plain").exit_code == 0
    assert {p: p.stat().st_mtime_ns for p in held.rglob("*.safetensors")} == before


def test_what_nobody_can_measure_has_to_be_given(user, tmp_path):
    recipe = (user / "recipe.toml").read_text()
    start = recipe.index("sentences = ["), recipe.index("]\n", recipe.index("sentences = [")) + 2
    other = user / "other.toml"
    other.write_text(recipe[: start[0]] + 'sentences = ["weighted"]\n' + recipe[start[1] :])
    for more in ((), ("--dry-run",)):
        done = call("run", other, "--to", tmp_path / "x", *more)
        assert done.exit_code == 1
        assert "needs the ingredient 'coefficients'" in " ".join(done.output.split())


@pytest.mark.parametrize("on", ["tasks", "inputs"])
def test_coefficients_are_learned_and_a_run_takes_them(user, tmp_path, on):
    found = tmp_path / "coefficients"
    told = ("--rows", 24, "--on", on, "--steps", 30, "--json")
    done = call("learn", "coefficients", user / "recipe.toml", "--to", found, *told)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"coefficients": {"coefficients": str(found)}}
    learned = merganser.open_weights(found)
    assert {tuple(learned[n].shape) for n in learned} == {(3,)}
    assert all(0 <= float(learned[n].min()) <= float(learned[n].max()) <= 1 for n in learned)
    assert not list(found.glob(".checkpoint*"))
    base = merganser.open_weights(user / "base")
    experts = {n: merganser.open_weights(user / "experts" / n) for n in ("stripes", "spots", "corners")}
    merged = merganser.merge(base, experts, "weighted", ingredients={"coefficients": learned})
    want = base["out.weight"] + sum(
        c * (w["out.weight"] - base["out.weight"]) for c, w in zip(learned["out.weight"], experts.values(), strict=True)
    )
    torch.testing.assert_close(merged["out.weight"], want)


def test_surgery_corrects_the_merged_model_it_was_learned_for(user, tmp_path):
    experts = [user / "experts" / n for n in ("stripes", "spots", "corners")]
    merged, other, found = tmp_path / "merged", tmp_path / "other", tmp_path / "surgery"
    merganser.merge(user / "base", experts, "task_arithmetic | scale(by=0.01)", into=merged)
    merganser.merge(user / "base", experts, "task_arithmetic | scale(by=0.4)", into=other)
    recipe = user / "recipe.toml"
    told = ("--to", found, "--model", merged, "--rows", 200, "--steps", 300)
    done = call("learn", "surgery", recipe, *told)
    assert done.exit_code == 0, done.output
    assert f"merganser eval {recipe} {merged} --surgery {found}" in "".join(done.output.split("\n")).replace("  ", " ")
    done = call("eval", recipe, merged, "--surgery", found, "--json")
    assert done.exit_code == 0, done.output
    scores = {name: told["mean"]["score"] for name, told in json.loads(done.stdout).items()}
    assert set(scores) == {str(merged), f"{merged}, corrected"}
    assert scores[f"{merged}, corrected"] > scores[str(merged)] + 0.02

    done = call("eval", recipe, other, "--surgery", found)
    assert done.exit_code == 1
    assert "was learned for another model" in done.output


def test_surgery_needs_one_merged_model(user, tmp_path):
    recipe, found = user / "recipe.toml", tmp_path / "x"
    expert = user / "experts" / "spots"
    for args, said in (
        (("learn", "surgery", recipe, "--to", found), "give it with --model"),
        (("learn", "gram", recipe, "--to", found, "--model", expert), "--model is for surgery"),
        (("eval", recipe, expert, expert, "--surgery", found), "corrects one model, got 2"),
        (("eval", recipe, expert, "--surgery", user / "base"), "no corrections here"),
        (("eval", recipe, expert, "--surgery", user / "base", "--dry-run"), "no corrections here"),
        (("learn", "surgery", recipe, "--to", found, "--model", tmp_path / "gone", "--dry-run"), "gone"),
    ):
        done = call(*args)
        assert done.exit_code == 1, done.output
        assert said in " ".join(done.output.split())
    assert not found.exists()


def test_another_word_is_told_before_work(user, tmp_path):
    done = call("learn", "fischer", user / "recipe.toml", "--to", tmp_path / "x")
    assert done.exit_code == 1
    assert "did you mean 'fisher'" in done.output
    assert not (tmp_path / "x").exists()
    done = call("learn", "coefficients", user / "recipe.toml", "--to", tmp_path / "x", "--on", "task")
    assert done.exit_code == 1
    assert "did you mean 'tasks'" in done.output
