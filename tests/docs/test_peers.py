"""The accuracy bench against peers: what it tells them, and what its results file and page say. No peer is needed."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merganser import merge
from merganser.mergekit import merge_config
from merganser.sentence import parse

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def bench():
    before = sys.path[:]
    spec = importlib.util.spec_from_file_location("peers_accuracy", ROOT / "bench" / "peers" / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules[spec.name]


def case_of(bench, slug):
    return next(case for case in bench.cases() if case.slug == slug)


def test_cases_are_sentences_with_names_of_their_own(bench):
    cases = bench.cases()
    assert len({case.slug for case in cases}) == len(cases)
    for case in cases:
        parse(case.sentence)


def test_mergekit_yaml_has_base_and_parameters(bench):
    told = case_of(bench, "mergekit:dare_ties").told
    assert bench.mergekit_yaml(told, "b", ["x", "y"]) == (
        "merge_method: dare_ties\n"
        "models:\n"
        "- model: x\n  parameters:\n    weight: 1.0\n    density: 0.2\n"
        "- model: y\n  parameters:\n    weight: 1.0\n    density: 0.2\n"
        "base_model: b\n"
        "parameters:\n  lambda: 0.3\n"
        "dtype: float32\n"
    )


def test_mergekit_yaml_leaves_out_what_a_method_has_not(bench):
    told = case_of(bench, "mergekit:karcher").told
    assert bench.mergekit_yaml(told, "b", ["x", "y"]) == (
        "merge_method: karcher\nmodels:\n- model: x\n- model: y\ndtype: float32\n"
    )


def test_our_sentences_are_what_our_reader_makes_of_mergekits_yaml(bench, tmp_path):
    rng = torch.Generator().manual_seed(0)
    models = {}
    for name in ("base", "x", "y", "z"):
        shapes = {"layers.0.weight": (12, 10), "layers.0.bias": (12,), "layers.1.weight": (12, 12)}
        models[name] = {n: torch.randn(shape, generator=rng) for n, shape in shapes.items()}
        (tmp_path / name).mkdir()
        save_file(models[name], tmp_path / name / "model.safetensors", {"format": "pt"})
    experts = [str(tmp_path / name) for name in ("x", "y", "z")]
    for case in (c for c in bench.cases() if c.peer == "mergekit" and c.name != "ties, paper"):
        (tmp_path / "config.yml").write_text(bench.mergekit_yaml(case.told, str(tmp_path / "base"), experts))
        theirs = merge_config(tmp_path / "config.yml")
        ours = merge(tmp_path / "base", experts, case.sentence)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], msg=lambda told, c=case: f"{c.slug}: {told}")


def test_adapter_says_the_update(bench):
    assert bench.adapter_config("b", 4)["lora_alpha"] == bench.adapter_config("b", 4)["r"] == 4
    delta = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) @ torch.ones(3, 6)
    a, b = bench.factors(delta, 2)
    assert a.shape == (2, 6)
    assert b.shape == (8, 2)
    torch.testing.assert_close(b @ a, delta)


def test_distance_is_relative_to_the_update(bench):
    base = {"a": torch.zeros(2), "b": torch.zeros(2), "k": torch.zeros(2, dtype=torch.int64)}
    theirs = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2), "k": base["k"]}
    ours = {**theirs, "a": torch.tensor([3.0, 4.5])}
    assert bench.distance(base, ours, theirs) == {
        "largest": pytest.approx(0.1),
        "tensor": "a",
        "whole": pytest.approx(0.1),
    }
    assert bench.distance(base, theirs, theirs)["largest"] == 0


def test_distance_leaves_out_what_rounding_moved(bench):
    base = {"a": torch.ones(4), "b": torch.ones(4)}
    theirs = {"a": base["a"] * (1 + 2e-7), "b": base["b"] * 2}
    assert bench.distance(base, {"a": base["a"], "b": theirs["b"]}, theirs)["largest"] == 0


def test_missing_environment_is_told_with_its_remedy(bench, tmp_path):
    with pytest.raises(SystemExit, match=r"install.py mergekit --to"):
        bench.need(tmp_path, ["mergekit"])


def test_results_agree_with_their_rows_and_page(bench):
    told = json.loads((RESULTS / "peers_accuracy.json").read_text())
    page = (RESULTS / "peers_accuracy.md").read_text()
    known = {(case.peer, case.name): case for case in bench.cases()}
    assert [(row["peer"], row["case"]) for row in told["rows"]] == [k for k in known if k in {
        (row["peer"], row["case"]) for row in told["rows"]
    }]  # fmt: skip
    for row in told["rows"]:
        case = known[row["peer"], row["case"]]
        assert row["sentence"] == case.sentence
        if "failed" in row:
            continue
        assert (row["told"], row["note"]) == (case.told, case.note)
        for who in ("ours", "theirs"):
            mean = sum(task[who] for task in row["tasks"].values()) / len(row["tasks"])
            assert row[who] == pytest.approx(mean)
        gaps = {name: task["ours"] - task["theirs"] for name, task in row["tasks"].items()}
        assert abs(row["largest"]["difference"]) == pytest.approx(max(map(abs, gaps.values())))
        assert row["difference"] == pytest.approx(row["ours"] - row["theirs"])
    assert bench.records.peers(told) in page
