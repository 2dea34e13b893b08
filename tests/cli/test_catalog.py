"""`ls` and `show` tell what there is from files alone: as the imported steps say, and without torch."""

import ast
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from merganser import catalog, inventory, save
from merganser.cli import app
from merganser.sentence import find, ingredients_of, knobs_of, known_steps


@pytest.mark.parametrize("name", sorted(known_steps()))
def test_what_is_read_of_a_step_is_what_its_import_says(name):
    told = catalog.step(name)
    kind, function = find(name)
    assert told.kind == kind
    assert told.doc == ast.get_docstring(ast.parse(f"def f():\n    {function.__doc__!r}").body[0])
    assert told.knobs == {k: v for k, v in knobs_of(function).items() if k != "own"}
    if kind != "adapt":
        assert told.needs == ingredients_of(function)
        module = sys.modules[function.__module__]
        assert (told.scope is not None) == (hasattr(module, "passes") or hasattr(module, "prepare"))
        if told.cost != "spectral":
            cuts = "stream" if getattr(module, "ELEMENTWISE", False) else "whole"
            assert told.cost == ("by knobs" if hasattr(module, "elementwise") else cuts)


def test_every_step_is_listed_with_its_kind():
    assert {step.name: step.kind for step in catalog.steps() if step.origin == "merganser"} == known_steps()


def test_a_step_in_a_file_is_read_and_not_run(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        'raise SystemExit\n\ndef half(deltas, *, by=LIMIT, n=3):\n    """Return half.\n\n    More."""\n    return deltas[0]\n'
    )
    told = catalog.step(f"{path}:half")
    assert (told.kind, told.summary, told.knobs) == ("combine", "Return half.", {"by": "LIMIT", "n": 3})
    with pytest.raises(Exception, match="did you mean 'half'"):
        catalog.step(f"{path}:hlaf")


def test_an_unknown_step_is_an_error_with_a_suggestion():
    done = CliRunner().invoke(app, ["show", "tie"])
    assert done.exit_code == 1
    assert "did you mean 'ties'" in done.output


@pytest.fixture
def folder(tmp_path):
    shapes = {f"layers.{k}.{part}.weight": (6, 4) for k in range(3) for part in ("up", "down")}
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    weights["embed.weight"] = torch.randn(10, 4)
    weights["head.weight"] = weights["embed.weight"].clone()
    weights["norm.weight"] = torch.ones(4, dtype=torch.bfloat16)
    save(weights, tmp_path / "model", {"kind": "merge", "sentence": "ties", "inputs": {"base": "12ab"}})
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "toy", "vocab_size": 10}))
    save_file({"x": torch.zeros(2)}, tmp_path / "alone.safetensors")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    return tmp_path


def test_a_model_is_shown_by_pattern_with_card_ties_and_vocabulary(folder):
    told = inventory.model(folder / "model")
    groups = {g.pattern: (g.count, g.dtype, g.shape, g.nbytes) for g in told.groups}
    assert groups["layers.{0..2}.up.weight"] == (3, "F32", (6, 4), 3 * 96)
    assert groups["norm.weight"] == (1, "BF16", (4,), 8)
    assert told.tied == [("embed.weight", "head.weight")]
    assert told.vocabulary == {"vocab_size": 10, "tables": ["embed.weight", "head.weight"]}
    assert told.dtypes["F32"] == {"tensors": 8, "parameters": 6 * 24 + 80, "bytes": 4 * (6 * 24 + 80)}
    assert told.card["sentence"] == "ties"
    done = CliRunner().invoke(app, ["show", str(folder / "model")])
    assert done.exit_code == 0
    for words in ("layers.{0..2}.down.weight", "6 x 4", "sentence", "embed.weight = head.weight", "10 rows"):
        assert words in done.output


def test_numbers_that_are_no_range_are_listed():
    assert inventory.pattern_of(["a.0.b.1", "a.2.b.1"]) == "a.{0,2}.b.1"


def test_models_below_a_folder_are_listed_and_a_damaged_one_is_named(folder):
    found = {one.path: one for one in inventory.found_in([folder])}
    assert found[str(folder / "model")].sentence == "ties"
    assert found[str(folder / "model")].tensors == 9
    assert "not a safetensors file" in found[str(folder / "broken")].wrong
    done = CliRunner().invoke(app, ["ls", str(folder), "--json"])
    assert {one["path"] for one in json.loads(done.output)} == set(found)


def test_nothing_there_is_an_error(tmp_path):
    done = CliRunner().invoke(app, ["ls", str(tmp_path / "nowhere")])
    assert done.exit_code == 1
    assert "no such file or folder" in done.output


WORDS = (["--help"], ["ls"], ["ls", "--json"], ["show", "ties"], ["show", "."], ["ls", "."], ["merge", "--help"])


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_telling_imports_neither_torch_nor_pydantic(words, folder):
    code = (
        "import sys\nfrom merganser.cli import app\ntry:\n    app(sys.argv[1:])\nexcept SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'rich') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder / "model", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr.strip() == "[]"


def test_a_step_of_another_package_is_listed_unimported(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("raise SystemExit\n")
    (tmp_path / "theirs" / "steps.py").write_text(
        'def third(delta, *, by=3):\n    """Return a third."""\n    return delta / by\n'
    )
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[merganser.steps]\nthird = theirs.steps:third\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    catalog._entry_points.cache_clear()
    told = next(step for step in catalog.steps() if step.name == "third")
    catalog._entry_points.cache_clear()
    assert (told.kind, told.knobs, told.summary) == ("edit", {"by": 3}, "Return a third.")
    assert told.origin == "entry point theirs.steps:third"
