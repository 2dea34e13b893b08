"""A merge written as one adapter: what PEFT loads, as good as its rank allows, and told how good that is."""

import json
from pathlib import Path

import pytest
import torch
from nets import KINDS, LINEAR, base, by_hand, write, written
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import merganser
from merganser.card import read_card
from merganser.cli import app
from merganser.errors import SentenceError, WeightsError
from merganser.weights.adapter import Adapter
from merganser.weights.header import Headers, header

MODULES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (8, 6), "layers.1.square": (8, 8)}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    base(tmp_path / "base")
    for k, rank in enumerate((2, 1, 3)):
        by_hand(tmp_path / f"e{k}", dict(list(MODULES.items())[: 3 - k % 2]), rank, seed=k)
    return tmp_path


def paths(made: Path) -> list[Path]:
    return [made / f"e{k}" for k in range(3)]


def merged_by(adapter: Path, made: Path) -> dict[str, Tensor]:
    """Return base plus adapter, read by ourselves."""
    return dict(merganser.merge(made / "base", [adapter], "average"))


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert set(a) == set(b)
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "how", ["average", "task_arithmetic(weights=[1, -2, 0.5]) | scale(by=0.4)", "knots | ties", "core | tsv"]
)
@pytest.mark.parametrize("rank", ["exact", 8])
def test_with_room_enough_it_is_the_merge(made: Path, how: str, rank: int | str) -> None:
    adapter = merganser.merge(made / "base", paths(made), how, into=made / "out", stored="adapter", rank=rank)
    assert isinstance(adapter, Adapter)
    same(merged_by(made / "out", made), dict(merganser.merge(made / "base", paths(made), how)))
    told = read_card(made / "out")["adapter"]
    assert told["error"]["all"] < 1e-6
    assert set(told["errors"]) == set(MODULES)
    assert told["rank"] == rank


@pytest.mark.parametrize("how", ["average", "ties(density=0.4)", "knots | ties", "trim(density=0.5) | average"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_rank_keeps_the_most_and_the_card_tells_the_rest(made: Path, how: str, rank: int) -> None:
    origin = merganser.open_weights(made / "base")
    merganser.merge(made / "base", paths(made), how, into=made / "out", stored="adapter", rank=rank)
    full, ours = merganser.merge(made / "base", paths(made), how), merged_by(made / "out", made)
    told = read_card(made / "out")["adapter"]
    for module in MODULES:
        delta, mine = (w[f"{module}.weight"] - origin[f"{module}.weight"] for w in (full, ours))
        u, s, vh = torch.linalg.svd(delta)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close(mine, best, rtol=1e-3, atol=1e-4)
        wanted = float(s[rank:].norm() / s.norm())
        assert told["errors"][module] == pytest.approx(wanted, abs=1e-3)
    assert told["error"]["worst"][1] == max(told["errors"].values())


def test_no_rank_is_the_largest_and_memory_is_disk(made: Path) -> None:
    disk = merganser.merge(made / "base", paths(made), "average", into=made / "out", stored="adapter")
    memory = merganser.merge(made / "base", paths(made), "average", stored="adapter")
    assert set(disk) == set(memory)
    assert all(torch.equal(disk[n], memory[n]) for n in disk)
    assert disk.config["r"] == 3
    assert disk.config["lora_alpha"] == 3


@pytest.mark.parametrize("how", ["average", "knots | ties", "ties", "core | tsv"])
def test_without_a_base_it_is_the_same(made: Path, how: str) -> None:
    ours = merganser.merge(None, paths(made), how, stored="adapter", rank=3)
    theirs = merganser.merge(made / "base", paths(made), how, stored="adapter", rank=3)
    assert set(ours) == set(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    assert merganser.check(None, paths(made), how, into=made / "out", stored="adapter", rank=3).ok


@pytest.mark.parametrize("how", ["average", "knots | ties", "core | tsv | scale(by=0.5)"])
def test_the_bases_tensors_are_not_read(made: Path, how: str) -> None:
    origin = merganser.open_weights(made / "base")
    names_alone = Headers({name: header(origin, name) for name in origin}, "names alone")
    ours = merganser.merge(names_alone, paths(made), how, stored="adapter")
    theirs = merganser.merge(made / "base", paths(made), how, stored="adapter")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def fails(made: Path, match: str, *, base: Path | None = None, how: str = "average", **told: object) -> None:
    told = {"stored": "adapter", **told}
    with pytest.raises((WeightsError, SentenceError), match=match):
        merganser.merge(base or made / "base", paths(made), how, into=made / "out", **told)
    found = merganser.check(base or made / "base", paths(made), how, into=made / "out", **told)
    assert len(found.errors) == 1
    assert not (made / "out").exists()


def test_what_cannot_be_is_refused(made: Path) -> None:
    fails(made, "'ties' is not linear, so what it makes of 'layers.0.q_proj.weight'", how="ties", rank="exact")
    fails(made, "not linear", how="knots | ties | trim(density=0.5)", rank="exact")
    fails(made, "whole number of at least 1", rank=0)
    fails(made, "whole number of at least 1", rank="all")
    fails(made, "one part", part=(1, 2))
    fails(made, "give --as-adapter", stored="model", rank=3)
    with pytest.raises(WeightsError, match="without a base only an adapter"):
        merganser.merge(None, paths(made), "average")
    with pytest.raises(WeightsError, match="is no adapter"):
        merganser.merge(made / "base", [made / "base", *paths(made)], "average", stored="adapter")
    with pytest.raises(WeightsError, match="is no adapter"):
        merganser.merge(None, [made / "base"], "average", stored="adapter")
    told = load_file(made / "e0" / "adapter_model.safetensors")
    told |= {f"base_model.model.{m}.lora_magnitude_vector": torch.ones(s[0]) for m, s in MODULES.items()}
    write(made / "e0", told, json.loads((made / "e0" / "adapter_config.json").read_text()) | {"use_dora": True})
    fails(made, "expert 'e0' changes 'layers.0.q_proj.weight' by more than a product", rank="exact")
    with pytest.raises(WeightsError, match="is DoRA's"):
        merganser.merge(None, paths(made), "average", stored="adapter")
    assert merganser.merge(made / "base", paths(made), "average", stored="adapter", rank=8)


def test_a_tensor_in_full_needs_the_base(made: Path) -> None:
    told = load_file(made / "e0" / "adapter_model.safetensors") | {
        "base_model.model.classifier.weight": torch.ones(3, 8)
    }
    write(made / "e0", told, json.loads((made / "e0" / "adapter_config.json").read_text()))
    with pytest.raises(WeightsError, match=r"the base lacks, 'classifier.weight'"):
        merganser.merge(None, paths(made), "average", stored="adapter")
    merganser.merge(made / "base", paths(made), "average", into=made / "out", stored="adapter", rank="exact")
    same(merged_by(made / "out", made), dict(merganser.merge(made / "base", paths(made), "average")))
    config = json.loads((made / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]


def test_from_the_command_line(made: Path) -> None:
    experts = [str(path) for path in paths(made)]
    words = ["merge", str(made / "base"), *experts, "--how", "average", "--to", str(made / "out"), "--as-adapter"]
    done = CliRunner().invoke(app, [*words, "--rank", "2"])
    assert done.exit_code == 0, done.output
    assert "one adapter of rank 2, 3 modules" in done.stdout
    assert "relative error:" in done.stdout
    assert "library_name: peft" in (made / "out" / "README.md").read_text()
    done = CliRunner().invoke(app, ["merge", "none", *words[2:], "--rank", "exact", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["adapter"]["rank"] == "exact"
    assert CliRunner().invoke(app, [*words, "--dry-run", "--rank", "0"]).exit_code == 1
    assert CliRunner().invoke(app, [*words, "--delta"]).exit_code == 2


def test_an_adapter_takes_the_place_of_a_model_and_of_an_adapter(made: Path) -> None:
    base(made / "out", seed=3)
    for rank in (1, 2):
        adapter = merganser.merge(made / "base", paths(made), "average", into=made / "out", stored="adapter", rank=rank)
        assert adapter.config["r"] == rank
    assert sorted(p.name for p in (made / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "card.json"
    ]  # fmt: skip


# PEFT as the judge


@pytest.mark.parametrize(
    "kinds",
    [
        ["plain", "patterns", "rslora"], ["modules_to_save", "plain"], ["bias all", "plain"], ["bias lora_only", "plain"],
        ["lora_bias", "plain"], ["embedding", "plain"], ["convolution"], ["conv1d"], ["conv1d", "conv1d among linear"],
        ["dora", "plain"], ["modules_to_save", "bias all"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_peft_loads_it_and_makes_the_same_of_it(tmp_path: Path, kinds: list[str]) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the oracle here")
    for seed, kind in enumerate(kinds):
        written(tmp_path / kind, base(tmp_path / "base", conv1d=True), KINDS[kind], seed)
    experts = [tmp_path / kind for kind in kinds]
    rank = 24 if "dora" in kinds else "exact"
    merganser.merge(tmp_path / "base", experts, "average", into=tmp_path / "out", stored="adapter", rank=rank)
    model = peft.PeftModel.from_pretrained(base(tmp_path / "base", conv1d=True), str(tmp_path / "out"))
    theirs = dict(model.merge_and_unload().state_dict())
    same(theirs, dict(merganser.merge(tmp_path / "base", experts, "average")), 5e-5)


def added(made: Path, **how: object) -> dict[str, Tensor]:
    """Return what PEFT's add_weighted_adapter makes of the adapters, merged into the base."""
    import peft

    model = peft.PeftModel.from_pretrained(base(made / "base"), str(paths(made)[0]), adapter_name="e0")
    for path in paths(made)[1:]:
        model.load_adapter(str(path), adapter_name=path.name)
    model.add_weighted_adapter(["e0", "e1", "e2"], [0.5, 0.3, 0.2], "merged", **how)
    model.set_adapter("merged")
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    ("how", "rank"), [({"combination_type": "cat"}, "exact"), ({"combination_type": "svd", "svd_rank": 2}, 2)]
)
def test_it_is_what_peft_adds(tmp_path: Path, how: dict, rank: int | str) -> None:
    pytest.importorskip("peft", reason="PEFT is the oracle here")
    base(tmp_path / "base")
    for k, size in enumerate((2, 1, 3)):
        by_hand(tmp_path / f"e{k}", LINEAR, size, seed=k)
    sentence = "task_arithmetic(weights=[0.5, 0.3, 0.2])"
    merganser.merge(tmp_path / "base", paths(tmp_path), sentence, into=tmp_path / "out", stored="adapter", rank=rank)
    same(merged_by(tmp_path / "out", tmp_path), added(tmp_path, **how))


@pytest.mark.parametrize("kind", ["bitsandbytes 4 bits", "bitsandbytes 8 bits", "gptq"])
def test_a_quantised_base_is_not_read_and_full_weights_are_refused(kind, tmp_path):
    name, shape = "layers.0.q_proj", (64, 96)
    tensors, folders = {}, []
    for k in range(2):
        rng = torch.Generator().manual_seed(k)
        factors = {"lora_A": torch.randn(4, shape[1], generator=rng), "lora_B": torch.randn(shape[0], 4, generator=rng)}
        folders.append(tmp_path / f"a{k}")
        folders[-1].mkdir()
        named = {f"base_model.model.{name}.{part}.weight": t for part, t in factors.items()}
        save_file(named, folders[-1] / "adapter_model.safetensors")
        told = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folders[-1] / "adapter_config.json").write_text(json.dumps(told))
    if kind == "gptq":
        tensors[f"{name}.qweight"] = torch.zeros(12, 64, dtype=torch.int32)
    elif kind == "bitsandbytes 8 bits":
        tensors[f"{name}.weight"] = torch.zeros(shape, dtype=torch.int8)
    else:
        tensors[f"{name}.weight"] = torch.zeros(64 * 96 // 2, 1, dtype=torch.uint8)
    tensors["norm.weight"] = torch.ones(96)
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    experts = {f"a{k}": folder for k, folder in enumerate(folders)}
    with pytest.warns(UserWarning, match="so the base is not read"):
        merganser.merge(tmp_path / "base", experts, "knots | ties", into=tmp_path / "one", stored="adapter")
    merganser.merge(None, experts, "knots | ties", into=tmp_path / "none", stored="adapter")
    with_, without = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "none"))
    assert with_.keys() == without.keys()
    assert all(torch.equal(with_[n], without[n]) for n in with_)
    with pytest.raises(WeightsError, match="quantised"):
        merganser.merge(tmp_path / "base", experts, "ties", into=tmp_path / "full")
    assert not (tmp_path / "full").exists()
