"""Configs give mergekit's numbers: those of mergekit 0.1.5, stored, and of mergekit itself where it is installed."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from golden import CONFIGS, GOLDEN, STORED, run
from llamas import families, tokens_of, write_all
from safetensors.torch import load_file
from torch import Tensor

from merganser.mergekit import merge_config, plans
from merganser.weights.header import Headers, folder_of, header
from merganser.weights.open import open_headers

CASES = sorted(path.stem for path in CONFIGS.glob("*.yml"))
RANDOM = [case for case in CASES if case.endswith("_random")]
TOLD = json.loads(GOLDEN.with_suffix(".json").read_text())["cases"]


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, stored: dict[str, Tensor]) -> Path:
    """All models that the configs name, as they were when the numbers were made, and the configs beside them."""
    kept = {who: of(stored, f"inputs/{who}") for who in STORED}
    root = write_all(tmp_path_factory.mktemp("models"), {**kept, "plain": kept["base"]})
    for case in CASES:
        (root / f"{case}.yml").write_text((CONFIGS / f"{case}.yml").read_text())
    return root


def of(stored: Mapping[str, Tensor], case: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{case}/"): t for name, t in stored.items() if name.startswith(f"{case}/")}


def assert_equal(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        torch.testing.assert_close(got[name], tensor, rtol=2e-6, atol=2e-7, msg=lambda told, n=name: f"{n}: {told}")


@pytest.mark.parametrize("case", [case for case in CASES if case not in RANDOM])
def test_numbers_are_mergekits(case: str, models: Path, stored: dict[str, Tensor]) -> None:
    got = merge_config(models / f"{case}.yml")
    assert len(got) == TOLD[case]["tensors"]
    assert_equal(got, of(stored, case))


def outcome(
    got: Mapping[str, Tensor], base: Mapping[str, Tensor], expert: Mapping[str, Tensor], density: float
) -> None:
    """Assert what a random sparsity of one expert gives: zeros, and survivors times one number a tensor.

    That number is the l1 norm before over the one after, whatever was drawn; so mergekit's own draws obey it too.
    """
    kept = total = 0
    for name, tensor in got.items():
        delta, merged = (expert[name] - base[name]).double(), (tensor - base[name]).double()
        there = merged.abs() > 1e-6
        if there.any():
            ratio = delta.abs().sum() / delta[there].abs().sum()
            torch.testing.assert_close(merged[there], delta[there] * ratio, rtol=1e-4, atol=2e-6)
        kept, total = kept + int(there.sum()), total + there.numel()
    assert abs(kept / total - density) < 4 * (density * (1 - density) / total) ** 0.5


@pytest.mark.parametrize("case", RANDOM)
def test_random_methods_keep_mergekits_laws(case: str, models: Path, stored: dict[str, Tensor]) -> None:
    base, expert = of(stored, "inputs/base"), of(stored, "inputs/a")
    outcome(of(stored, case), base, expert, 0.6)
    outcome(merge_config(models / f"{case}.yml"), base, expert, 0.6)


def test_a_seed_decides_what_is_drawn(models: Path) -> None:
    one, same, other = (merge_config(models / "dare_ties_random.yml", seed=seed) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


@pytest.mark.parametrize("case", ["ties", "slices_ties", "platypus_stack", "karcher", "half_precision", "della_random"])
def test_streamed_is_in_memory_bit_by_bit(case: str, models: Path, tmp_path: Path) -> None:
    streamed = merge_config(models / f"{case}.yml", into=tmp_path / "out", seed=3)
    memory = merge_config(models / f"{case}.yml", seed=3)
    assert sorted(streamed) == sorted(memory)
    assert all(torch.equal(streamed[name], memory[name]) for name in memory)


@pytest.mark.parametrize(
    "case",
    [
        "platypus_stack",
        "half_precision",
        "tokenizer_union",
        "tokenizer_base",
        "tokenizer_more",
        "tokenizer_new",
        "modules_slices",
    ],
)
def test_config_json_is_mergekits(case: str, models: Path, tmp_path: Path) -> None:
    merge_config(models / f"{case}.yml", into=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    want = {key: value for key, value in TOLD[case].items() if key not in ("tensors", "dtype")}
    assert config["torch_dtype"] == TOLD[case]["dtype"]
    assert {key: config.get(key) for key in want} == want
    assert (tmp_path / "mergekit_config.yml").read_text() == (CONFIGS / f"{case}.yml").read_text()


def test_the_output_gets_the_tokenizer_that_was_asked_for(models: Path, tmp_path: Path) -> None:
    for choice, extra in (("union", ["<x>", "<y>"]), ("base", []), ("more", ["<x>", "<y>"])):
        merge_config(models / f"tokenizer_{choice}.yml", into=tmp_path / choice)
        assert list(tokens_of(tmp_path / choice))[16:] == extra
    merge_config(models / "tokenizer_new.yml", into=tmp_path / "new")
    assert list(tokens_of(tmp_path / "new"))[16:] == ["<x>", "<new>", "<y>", "<none>"]


@pytest.mark.parametrize("case", CASES)
def test_a_plan_needs_headers_alone(case: str, models: Path) -> None:
    def headers(source: object) -> Headers:
        stored = open_headers(source)
        return Headers({name: header(stored, name) for name in stored}, str(source), folder_of(stored))

    made = plans(models / f"{case}.yml", opened=headers)[0][0]
    assert len(made.spec) == TOLD[case]["tensors"]
    assert set(made.names) <= set(made.spec)
    got = merge_config(models / f"{case}.yml")
    assert {n: shape for n, (_, shape) in made.spec.items()} == {n: tuple(t.shape) for n, t in got.items()}


@pytest.mark.slow
@pytest.mark.skipif("MERGEKIT_PYTHON" not in os.environ, reason="MERGEKIT_PYTHON: a Python that has mergekit 0.1.5")
def test_mergekit_itself_gives_these_numbers(tmp_path: Path) -> None:
    root = write_all(tmp_path, families())
    out = run(root, os.environ["MERGEKIT_PYTHON"])
    for case in CASES:
        if case in RANDOM:
            continue
        (root / f"{case}.yml").write_text((CONFIGS / f"{case}.yml").read_text())
        assert_equal(merge_config(root / f"{case}.yml"), load_file(out / case / "model.safetensors"))


def test_every_case_is_compared(stored: dict[str, Tensor]) -> None:
    assert set(TOLD) == set(CASES) == {name.split("/")[0] for name in stored} - {"inputs"}
