"""An adapter read as an expert is what PEFT's merge_and_unload makes of it, for every kind of LoRA there is."""

import sys
from pathlib import Path

import pytest
import torch
from nets import KINDS, base, written

import merganser

pytest.importorskip("peft", reason="PEFT is the oracle here: pip install peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def assert_same(ours, theirs) -> None:
    assert set(ours) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_adapter_is_what_peft_merges(tmp_path: Path, kind: str) -> None:
    net = base(tmp_path / "base", conv1d=True)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    theirs = written(tmp_path / "one", net, KINDS[kind])
    ours = merganser.merge(tmp_path / "base", [tmp_path / "one"], "average")
    assert_same(ours, theirs)
    assert any(not torch.equal(theirs[n], before[n]) for n in before)
    for name in before:  # what the adapter leaves alone is the base's, bit by bit
        if torch.equal(theirs[name], before[name]):
            assert torch.equal(ours[name], before[name])


@pytest.mark.parametrize("how", ["average", "ties(density=0.5) | scale(by=0.7)", "tsv"])
def test_different_adapters_are_merged_as_the_models_they_stand_for(tmp_path: Path, how: str) -> None:
    kinds = ["plain", "patterns", "dora", "modules_to_save", "embedding", "bias all"]
    models = {k: written(tmp_path / k, base(tmp_path / "base"), KINDS[k], n) for n, k in enumerate(kinds)}
    origin = dict(base(tmp_path / "base").state_dict())
    ours = merganser.merge(tmp_path / "base", {k: tmp_path / k for k in kinds}, how)
    theirs = merganser.merge(origin, models, how)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_pickled_adapter_and_half_precision(tmp_path: Path) -> None:
    theirs = written(tmp_path / "one", base(tmp_path / "base"), KINDS["plain"], safe_serialization=False)
    assert (tmp_path / "one" / "adapter_model.bin").is_file()
    assert_same(merganser.merge(tmp_path / "base", [tmp_path / "one"], "average"), theirs)
    merganser.save({n: t.bfloat16() for n, t in merganser.open_weights(tmp_path / "base").items()}, tmp_path / "half")
    half = merganser.merge(tmp_path / "half", [tmp_path / "one"], "average")
    assert all(t.dtype == torch.bfloat16 for t in half.values())
    torch.testing.assert_close({n: t.float() for n, t in half.items()}, theirs, rtol=2e-2, atol=2e-2)


def test_peft_is_not_imported(tmp_path: Path) -> None:
    import subprocess

    written(tmp_path / "one", base(tmp_path / "base"), KINDS["plain"])
    code = (
        "import sys, merganser\n"
        f"merganser.merge({str(tmp_path / 'base')!r}, [{str(tmp_path / 'one')!r}], 'ties')\n"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
