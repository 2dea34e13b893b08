"""The main job from a recipe: done once, redone only where something changed, and wrong input told in one line."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import merganser
from merganser.cli import app
from merganser.evaluate.run import Model, evaluate
from merganser.prepare import prepare
from merganser.recipe import read_recipe, to_toml


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def done(user, tmp_path_factory):
    to = tmp_path_factory.mktemp("runs") / "out"
    result = call("run", user / "recipe.toml", "--to", to, "--json")
    assert result.exit_code == 0, result.output
    return to, json.loads(result.stdout)


def copied(user, tmp_path):
    folder = tmp_path / "user"
    shutil.copytree(user, folder)
    return folder


def test_everything_is_there(done):
    to, told = done
    names = {p.name for p in to.iterdir()}
    assert names == {
        "recipe.toml",
        "adapted",
        "rows",
        "merged",
        "scores.json",
        "diagnosis.json",
        "run.json",
        "report.html",
    }
    scores = json.loads((to / "scores.json").read_text())
    assert scores == told["scores"]
    assert len(scores["rows"]) == 5, "task arithmetic as written and tuned, twice, and average"
    assert {g["merge"] for g in scores["gains"]} == {"task_arithmetic"}
    assert all(row["mean"]["low"] <= row["mean"]["score"] <= row["mean"]["high"] for row in scores["rows"])


def test_the_table_says_what_a_person_finds_with_the_parts(user, done):
    to, told = done
    ready = prepare(read_recipe(user / "recipe.toml"))
    how = "task_arithmetic | scale(by=0.4)"
    row = next(r for r in told["scores"]["rows"] if r["merge"] == "task_arithmetic" and not r["adapt"] and r["tuned"])
    how = row["sentence"]
    merged = merganser.merge(user / "base", {n: user / "experts" / n for n in ready.experts}, how)
    scores = evaluate(Model(ready.encoder, merged, ready.heads, "fp32"), ready.test)
    assert scores.mean == pytest.approx(row["mean"]["score"])
    for task, outcome in scores.items():
        want = float(np.mean(outcome.predictions == ready.test[task].labels))
        assert row["tasks"][task]["score"] == pytest.approx(want)
    diagnosis = json.loads((to / "diagnosis.json").read_text())
    found = next(x for x in diagnosis["xi"] if x["sentence"] == how)
    direct = merganser.diagnose(
        ready.base, ready.experts, merged, encoder=ready.encoder, heads=ready.heads, kind="fp32",
        inputs={n: t.inputs for n, t in ready.test.items()},
    )  # fmt: skip
    assert found["sum"] == pytest.approx(direct.total("merged"), rel=1e-5)
    assert row["xi"] == found["sum"]


def test_the_union_of_all_classes_is_ranked_for_merges_base_and_experts_side_by_side(user, done, capsys):
    from merganser.evaluate.ensemble import ensembles
    from merganser.show import show_table

    _, told = done
    ready, joint = prepare(read_recipe(user / "recipe.toml")), told["scores"]["joint"]
    assert joint["classes"] == len({c.casefold() for task in ready.tasks.values() for c in task.classes})
    assert joint["classes"] <= joint["classes_published"] <= sum(len(task.classes) for task in ready.tasks.values())
    found = ensembles(ready.encoder, ready.experts, ready.test, ready.union, kind="fp32")
    for form, scores in found.items():
        assert joint[f"ensemble_{form}"] == {"hits": scores.hits(), "hits_published": scores.hits("published")}
    everything = [joint["base"], joint["ensemble_own"], joint["ensemble_all"], *told["scores"]["rows"]]
    for part in everything:
        for form in ("hits", "hits_published"):
            assert set(part[form]) == {"1", "3", "5", "10"}
        assert all(part["hits"][k]["micro"] >= part["hits_published"][k]["micro"] for k in part["hits"])
    show_table(told["scores"])
    shown = capsys.readouterr().out
    for name, part in (("own heads", joint["ensemble_own"]), ("all heads", joint["ensemble_all"])):
        line = next(line for line in shown.splitlines() if f"experts side by side, {name}" in line)
        assert f"{100 * part['hits']['1']['macro']:.1f}" in line
    assert f"hits@1 among the {joint['classes']} classes of all tasks" in shown


def test_the_best_model_is_kept_and_loads(user, done):
    to, told = done
    card = json.loads((to / "merged" / "card.json").read_text())
    best = max((r for r in told["scores"]["rows"] if r["tuned"]), key=lambda r: r["val"])
    assert card["sentence"] == best["sentence"]
    ready = prepare(read_recipe(user / "recipe.toml"))
    scores = evaluate(Model(ready.encoder, merganser.open_weights(to / "merged"), ready.heads, "fp32"), ready.test)
    assert scores.mean == pytest.approx(best["mean"]["score"])


def stages(to):
    return {s["name"]: s["reused"] for s in json.loads((to / "run.json").read_text())["stages"]}


def files(to, pattern):
    return {str(p.relative_to(to)): p.stat().st_mtime_ns for p in to.glob(pattern)}


def test_a_second_run_does_nothing_again_and_a_changed_knob_only_what_depends_on_it(user, done, tmp_path):
    to = tmp_path / "out"
    shutil.copytree(done[0], to)
    folder = copied(user, tmp_path)
    before = files(to, "**/*.safetensors")
    assert call("run", folder / "recipe.toml", "--to", to).exit_code == 0
    assert files(to, "**/*.safetensors") == before
    assert all(reused for reused in stages(to).values()), stages(to)

    recipe = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(recipe.replace("scale(by=1.0)", "scale(by=0.9)"))
    assert call("run", folder / "recipe.toml", "--to", to).exit_code == 0
    assert files(to, "adapted/**/*.safetensors") == {k: v for k, v in before.items() if k.startswith("adapted")}
    again = stages(to)
    assert again["score average"]
    assert again["adapt ri(steps=40, lr=0.003, batch=32)"]
    assert not again["score task_arithmetic | scale(by=0.9)"]
    assert again["score base and experts"]

    (folder / "recipe.toml").write_text(recipe.replace("steps=40", "steps=41"))
    assert call("run", folder / "recipe.toml", "--to", to).exit_code == 0
    again = stages(to)
    assert not again["score ri(steps=41, lr=0.003, batch=32) | task_arithmetic | scale(by=1.0)"]
    assert again["score average"]


def test_the_same_recipe_gives_the_same_numbers_elsewhere(user, done, tmp_path):
    assert call("run", user / "recipe.toml", "--to", tmp_path / "again").exit_code == 0
    one, two = (json.loads((to / "scores.json").read_text()) for to in (done[0], tmp_path / "again"))
    for told in (one, two):
        told.pop("date", None)  # another day is no other number
        for row in told["rows"]:
            row.pop("seconds")
    assert one == two


def test_the_recipe_in_the_run_folder_is_the_recipe(user, done):
    assert read_recipe(done[0] / "recipe.toml") == read_recipe(user / "recipe.toml")


def test_a_recipe_survives_writing(user):
    recipe = read_recipe(user / "recipe.toml")
    path = user / "again.toml"
    path.write_text(to_toml(recipe))
    assert read_recipe(path) == recipe


BAD = {
    "no recipe": (lambda f: (f / "recipe.toml").unlink(), "no such recipe"),
    "not toml": (lambda f: (f / "recipe.toml").write_text("a = ["), "not valid TOML"),
    "unknown key": (("sentences =", "sentencs ="), "unknown key 'sentencs' (did you mean 'sentences'?)"),
    "unknown inner key": (('precision = "fp32"', 'precison = "fp32"'), "(did you mean 'precision'?)"),
    "wrong precision": (('"fp32"', '"fp8"'), "'model.precision'"),
    "unknown step": (('"average"', '"averge"'), "unknown step 'averge' (did you mean 'average'?)"),
    "unknown knob": (("steps=40", "stepps=40"), "no knob 'stepps' (did you mean 'steps'?)"),
    "knob out of range": (("steps=40", "steps=-4"), "steps must be positive, got -4"),
    "wrong base": (('base = "base"', 'base = "bass"'), "no such file or folder"),
    "wrong expert": (('"experts/spots"', '"experts/spits"'), "no such file or folder"),
    "wrong task": (('folder = "tasks"', 'stripes = "tasks/stripes"'), "expert 'spots' has no task of that name"),
    "wrong encoder": (("net.py:build", "net.py:bild"), "(did you mean 'build'?)"),
    "wrong option": (('precision = "fp32"', 'options = {wdth = 12}'), "(did you mean 'width'?)"),
    "wrong heads": (('"class-mean"', '"class-means"'), "'heads.kind'"),
    "no prompts": (('"class-mean"', '"zero-shot"'), "cannot embed prompts"),
    "no inputs": (('[inputs]\nfiles = ["inputs.npz"]', ""), "the recipe has no [inputs]"),
    "wrong inputs": (('"inputs.npz"', '"inputs.nnpz"'), "no such file of unlabeled inputs"),
    "empty inputs": (lambda f: np.savez(f / "inputs.npz", x=np.zeros((0, 8, 8, 1), np.uint8)), "'x' must be uint8"),
    "text for pixels": (lambda f: (f / "inputs.npz").write_text("hello"), "not images with 'x'"),
    "no val": (lambda f: (f / "tasks/spots/val.npz").unlink(), "task 'spots' has no val split"),
    "label too high": (
        lambda f: np.savez(f / "tasks/spots/test.npz", x=np.zeros((2, 8, 8, 1), np.uint8), y=np.array([0, 7])),
        "label 7 in test, but only 3 classes are named",
    ),
    "nan": (lambda f: poison(f / "experts/spots"), "expert 'spots' has NaN or inf in tensor 'norm.weight'"),
    "other shape": (lambda f: reshape(f / "experts/spots"), "expert 'spots' has other shapes: 'norm.bias' [9]"),
    "other keys": (lambda f: rename(f / "experts/spots"), "expert 'spots' lacks 'norm.bias'"),
    "hostile pickle": (lambda f: pickled(f / "experts/spots"), "refused, and nothing in it was run: this pickle wants"),
}  # fmt: skip


def poison(folder):
    weights = dict(merganser.open_weights(folder))
    weights["norm.weight"] = weights["norm.weight"].clone()
    weights["norm.weight"][0] = float("nan")
    merganser.save(weights, folder)


def reshape(folder):
    merganser.save({**merganser.open_weights(folder), "norm.bias": torch.zeros(9)}, folder)


def rename(folder):
    weights = dict(merganser.open_weights(folder))
    weights["norm.bais"] = weights.pop("norm.bias")
    merganser.save(weights, folder)


class Hostile:
    def __reduce__(self):
        return os.abort, ()


def pickled(folder):
    torch.save({**merganser.open_weights(folder), "more": Hostile()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_any_work(user, tmp_path, case):
    folder = copied(user, tmp_path)
    change, says = BAD[case]
    if callable(change):
        change(folder)
    else:
        text = (folder / "recipe.toml").read_text()
        assert change[0] in text
        (folder / "recipe.toml").write_text(text.replace(*change))
    result = call("run", folder / "recipe.toml", "--to", tmp_path / "out")
    assert result.exit_code == 1, result.output
    assert says in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sentences_that_begin_alike_share_their_adapted_experts(user, tmp_path):
    recipe = (user / "recipe.toml").read_text()
    start = recipe.index("sentences = [")
    end = recipe.index("]\n", start) + 2
    words = ["ri(steps=4, lr=0.003)", "ri(steps=4, lr=0.003) | coadapt(steps=4, lr=0.003)"]
    told = f'sentences = ["{words[1]} | ties", "{words[0]} | ties"]\n'
    (user / "together.toml").write_text(recipe[:start] + told + recipe[end:])
    plan = json.loads(call("run", user / "together.toml", "--to", tmp_path / "out", "--dry-run", "--json").stdout)
    adapting = [one["stage"] for one in plan["plan"]["stages"] if one["stage"].startswith("adapt")]
    assert adapting == [f"adapt {n} by {w}" for w in words for n in ("stripes", "spots", "corners")]
    done = call("run", user / "together.toml", "--to", tmp_path / "out")
    assert done.exit_code == 0, done.output
    folders = sorted(p.name for p in (tmp_path / "out" / "adapted").iterdir())
    assert folders == [".targets", "ri-steps-4-lr-0.003", "ri-steps-4-lr-0.003-coadapt-steps-4-lr-0.003"]
    files = list((tmp_path / "out" / "adapted" / ".targets").iterdir())
    assert len(files) == 4, "what the base and three experts say, for both words"
    again = json.loads(call("run", user / "together.toml", "--to", tmp_path / "out", "--dry-run", "--json").stdout)
    assert all(one["done"] for one in again["plan"]["stages"])


def test_without_a_diagnosis_there_is_a_report_all_the_same(user, tmp_path):
    recipe = (user / "recipe.toml").read_text()
    (user / "plain.toml").write_text(f"{recipe}\n[limits]\ndiagnose = 0\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "diagnosis.json").write_text("{}")  # an earlier run's
    plan = json.loads(call("run", user / "plain.toml", "--to", out, "--dry-run", "--json").stdout)["plan"]
    assert "diagnose" not in [one["stage"] for one in plan["stages"]]
    done = call("run", user / "plain.toml", "--to", out)
    assert done.exit_code == 0, done.output
    assert not (out / "diagnosis.json").exists()
    page = (out / "report.html").read_text()
    assert "Scores by task" in page
    assert "Where the experts interfere" not in page
    assert all(row["xi"] is None for row in json.loads((out / "scores.json").read_text())["rows"])


def test_verbs_on_one_recipe(user, done, tmp_path):
    to, told = done
    adapted = call(
        "adapt", user / "recipe.toml", "--how", "ri(steps=40, lr=0.003, batch=32)", "--to", tmp_path / "adapted"
    )
    assert adapted.exit_code == 0, adapted.output
    for name in ("stripes", "spots", "corners"):
        one = merganser.open_weights(tmp_path / "adapted" / name)
        two = merganser.open_weights(to / "adapted" / "ri-steps-40-lr-0.003-batch-32" / name)
        assert all(torch.equal(one[n], two[n]) for n in one)
    experts = [tmp_path / "adapted" / n for n in ("stripes", "spots", "corners")]
    assert (
        call("merge", user / "base", *experts, "--how", "task_arithmetic", "--to", tmp_path / "merged").exit_code == 0
    )
    scored = json.loads(call("eval", user / "recipe.toml", tmp_path / "merged", "--json").stdout)
    row = next(r for r in told["scores"]["rows"] if r["adapt"] and not r["tuned"])
    assert scored[str(tmp_path / "merged")]["mean"]["score"] == pytest.approx(row["mean"]["score"])
    seen = json.loads(call("diagnose", user / "recipe.toml", tmp_path / "merged", "--json").stdout)
    assert seen["sums"][str(tmp_path / "merged")] > 0
    assert "drift" in call("diagnose", user / "recipe.toml", tmp_path / "merged").stdout
    assert "mean" in call("eval", user / "recipe.toml", tmp_path / "merged").stdout
    assert call("report", to, "--to", tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_usage_is_exit_status_two():
    assert call("run").exit_code == 2
    assert call("mrge").exit_code == 2
    assert call("merge", "a", "b").exit_code == 2


def test_help_imports_no_torch():
    import subprocess
    import sys

    code = "import sys; from merganser.cli import app; import merganser; assert 'torch' not in sys.modules; app(['--help'])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "diagnose" in shown.stdout


@pytest.mark.slow
def test_a_run_killed_for_real_goes_on_to_the_same_numbers(user, done, tmp_path):
    import os
    import signal
    import subprocess
    import sys
    import time

    to = tmp_path / "out"
    command = [sys.executable, "-m", "merganser.cli", "run", str(user / "recipe.toml"), "--to", str(to)]
    for sign in ("adapted/*/stripes/card.json", "rows/task-arithmetic*.json", "rows/average.json"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while not list(to.glob(sign)) and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    one, two = (json.loads((folder / "scores.json").read_text()) for folder in (done[0], to))
    for told in (one, two):
        told.pop("date", None)  # another day is no other number
        for row in told["rows"]:
            row.pop("seconds")
    assert one == two
    assert not list(to.rglob(".*partial"))


def test_several_seeds_are_compared_on_one_page(user, tmp_path):
    from merganser.progress import silent
    from merganser.suites.suite import run_seeds

    page = run_seeds(read_recipe(user / "recipe.toml"), tmp_path / "out", 2, silent)
    assert page == tmp_path / "out" / "report.html"
    told = [json.loads((tmp_path / "out" / f"seed-{k}" / "scores.json").read_text()) for k in range(2)]
    assert [t["seed"] for t in told] == [0, 1]
    adapted = [[r["mean"]["score"] for r in t["rows"] if r["adapt"]] for t in told]
    plain = [[r["mean"]["score"] for r in t["rows"] if not r["adapt"]] for t in told]
    assert plain[0] == plain[1]
    assert "seed-0" in page.read_text()
    assert "seed-1" in page.read_text()
    assert len(adapted[0]) == len(adapted[1]) == 2


def test_other_domains_are_scored_with_the_head_of_their_task(user, tmp_path):
    """A domain that is a copy of a task's own test split scores what the task scores, row for row."""
    folder = copied(user, tmp_path)
    shift = folder / "shift" / "again"
    shift.mkdir(parents=True)
    told = (folder / "tasks" / "spots" / "task.toml").read_text().replace('name = "spots"', 'name = "again"')
    (shift / "task.toml").write_text(told + 'shift_of = "spots"\n')
    shutil.copy(folder / "tasks" / "spots" / "test.npz", shift / "test.npz")
    recipe = folder / "recipe.toml"
    recipe.write_text(recipe.read_text() + '\n[domains]\nagain = "shift/again"\n')
    result = call("run", recipe, "--to", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)["scores"]
    domains = scores["domains"]
    assert domains["tasks"] == [
        {"name": "again", "of": "spots", "test": scores["tasks"][1]["test"], "metric": "accuracy"}
    ]
    assert len(domains["rows"]) == len(scores["rows"])
    here = [scores["base"], scores["experts"], *scores["rows"]]
    there = [domains["base"], domains["experts"], *domains["rows"]]
    for one, other in zip(here, there, strict=True):
        assert other["tasks"]["again"]["score"] == one["tasks"]["spots"]["score"] == other["mean"]["score"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The same tasks in other domains" in page
    assert "of spots" in page
    again = json.loads(call("run", recipe, "--to", tmp_path / "out", "--json").stdout)
    assert again["scores"]["domains"] == domains
    (shift / "task.toml").write_text(told + 'shift_of = "dots"\n')
    wrong = call("check", recipe)
    assert wrong.exit_code == 1
    assert "shift of 'dots'" in wrong.output.replace("\n", " ")
    wrong = call("run", recipe, "--to", tmp_path / "out")
    assert wrong.exit_code == 1
    assert "shift of 'dots'" in wrong.output.replace("\n", " ")


def test_some_tasks_of_what_is_prepared_are_what_preparing_them_alone_gives(user):
    recipe = read_recipe(user / "recipe.toml")
    two = ["spots", "stripes"]
    some, alone = prepare(recipe).only(two), prepare(recipe.only(two))
    for part in ("experts", "tasks", "heads", "val", "test"):
        assert list(getattr(some, part)) == two
    assert (some.recipe, some.digests, some.scored_on) == (alone.recipe, alone.digests, alone.scored_on)
