"""RI on experts that are adapters: trained at the adapter's own rank, written as an adapter, read back like any."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import merganser
from merganser.steps.adapt.ri import ri
from merganser.steps.twins import distance
from merganser.suites.finetune import Lora, finetune_lora
from merganser.train import Checkpoint, Plan
from merganser.weights.adapter import CONFIG, FILES, Adapted, Adapter
from merganser.weights.header import Picked, factors
from merganser.weights.own_rank import adapter_in, own_rank, save_adapter
from merganser.weights.renamed import Renamed

LORA = Lora(rank=3, alpha=6, targets=("0", "3"))
HOW = "ri(steps=40, lr=0.003, batch=64)"
KNOBS = {"steps": 40, "lr": 3e-3, "batch": 64, "_precision": "fp32"}


@pytest.fixture(scope="module")
def adapters(toy, tmp_path_factory):
    """Write a LoRA expert of every task."""
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for k, (name, head) in enumerate(toy.heads.items()):
        how = {"start": k, "kind": "fp32", "batch": 64}
        tensors = finetune_lora(toy.base, toy.encoder, head, toy.train[name], Plan(60, 1e-2), LORA, **how)
        save_adapter(tensors, LORA.config("toy"), folder / name, {})
        found[name] = folder / name
    return found


def adapt(toy, adapters, into, how=HOW, **more):
    given = {"encoder": toy.encoder, "heads": toy.heads, "inputs": toy.inputs, "kind": "fp32", **more}
    return merganser.adapt(toy.base, adapters, how=how, into=into, **given)


def loss(toy, name, weights):
    x = torch.func.functional_call(toy.encoder, dict(weights), (toy.train[name].inputs,))
    return torch.nn.functional.cross_entropy(toy.heads[name](x), torch.from_numpy(toy.train[name].labels)).item()


def test_a_lora_expert_learns_its_task_and_is_base_plus_its_product(toy, adapters):
    for name, folder in adapters.items():
        weights, held = Adapted(toy.base, Adapter(folder)), load_file(folder / FILES[0])
        assert loss(toy, name, weights) < 0.8 * loss(toy, name, toy.base)
        for module in ("0", "3"):
            a, b = (held[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
            assert a.shape[0] == b.shape[1] == LORA.rank
            torch.testing.assert_close(weights[f"{module}.weight"], toy.base[f"{module}.weight"] + 2 * b @ a)
        assert all(torch.equal(weights[n], toy.base[n]) for n in toy.base if n not in ("0.weight", "3.weight"))


def test_different_starts_give_different_factors_and_one_start_the_same(toy):
    def once(start):
        head, task = toy.heads["east"], toy.train["east"]
        return finetune_lora(toy.base, toy.encoder, head, task, Plan(3, 1e-2), LORA, start=start, kind="fp32")

    one, same, other = once(1), once(1), once(2)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)


def test_the_adapted_expert_is_an_adapter_of_the_same_rank(toy, adapters, tmp_path):
    adapted = adapt(toy, adapters, tmp_path)
    for name in adapters:
        folder, held = tmp_path / name, load_file(tmp_path / name / FILES[0])
        assert sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".json")) == [
            CONFIG, FILES[0], "card.json"
        ]  # fmt: skip
        assert json.loads((folder / CONFIG).read_text()) == json.loads((adapters[name] / CONFIG).read_text())
        read = Adapted(toy.base, merganser.open_weights(folder))
        for module in ("0", "3"):
            key = f"{module}.weight"
            a, b = (held[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
            assert a.shape[0] == b.shape[1] == LORA.rank
            torch.testing.assert_close(adapted[name][key], toy.base[key] + 2 * b @ a)
            assert torch.equal(read[key], adapted[name][key])
            assert not torch.equal(read[key], Adapted(toy.base, Adapter(adapters[name]))[key]), "it was trained"
            assert factors(adapted[name], key) is not None
    again = adapt(toy, adapters, tmp_path)
    assert all(torch.equal(again[n][k], adapted[n][k]) for n in adapted for k in toy.base)
    assert all(adapter_in(again[n]) is not None for n in adapted)


def test_it_lowers_the_drift_under_other_heads(toy, adapters, tmp_path):
    def drift(weights, name):
        x = torch.cat([task.inputs for task in toy.tasks.values()])
        f, f0 = (torch.func.functional_call(toy.encoder, dict(w), (x,)) for w in (weights, toy.base))
        others = [h for n, h in toy.heads.items() if n != name]
        return torch.stack([distance("kl", h(f0), h(f)).mean() for h in others]).mean().item()

    adapted = adapt(toy, adapters, tmp_path, HOW.replace("40", "150"))
    for name, folder in adapters.items():
        assert drift(adapted[name], name) < 0.7 * drift(Adapted(toy.base, Adapter(folder)), name)


def test_in_memory_and_two_words_stay_adapters(toy, adapters):
    one = {"east": adapters["east"], "west": adapters["west"]}
    heads = {n: toy.heads[n] for n in one}
    adapted = adapt(toy, one, None, f"{HOW} | {HOW}", heads=heads)
    assert all(factors(w, "3.weight").left.shape[1] == LORA.rank for w in adapted.values())
    merged = merganser.merge(toy.base, adapted, "knots | ties")
    assert all(merged[n].isfinite().all() for n in toy.base)


def test_another_rank_or_a_full_expert_gives_whole_weights(toy, adapters, tmp_path):
    adapted = adapt(toy, adapters, tmp_path / "whole", HOW.replace(")", ", rank=0)"))
    assert all((tmp_path / "whole" / n / "model.safetensors").is_file() for n in adapted)
    full = {name: dict(Adapted(toy.base, Adapter(folder))) for name, folder in adapters.items()}
    own, none = (ri(full["east"], toy.base, toy.heads, toy.inputs, own="east", encoder=toy.encoder, rank=r, **KNOBS)
                 for r in ("own", 0))  # fmt: skip
    assert all(torch.equal(own[n], none[n]) for n in none)


def test_interrupted_and_resumed_ends_in_the_same_bytes(toy, adapters, tmp_path):
    expert = Adapted(toy.base, Adapter(adapters["north"]))

    def run(**more):
        return ri(expert, toy.base, toy.heads, toy.inputs, own="north", encoder=toy.encoder, **KNOBS, **more)

    class Killed(Exception):
        pass

    seen = 0

    def dies(advance=1, **_terms):
        nonlocal seen
        seen += advance
        if seen >= 17:
            raise Killed

    straight = run()
    with pytest.raises(Killed):
        run(_checkpoint=Checkpoint(tmp_path / "c", "k", every=0), _tick=dies)
    resumed = run(_checkpoint=Checkpoint(tmp_path / "c", "k", every=0))
    one, two = adapter_in(straight).adapter, adapter_in(resumed).adapter
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_pull_is_to_the_adapter_it_began_with(toy, adapters):
    expert = Adapted(toy.base, Adapter(adapters["north"]))
    far, near = (
        sum((w[n] - expert[n]).square().sum() for n in ("0.weight", "3.weight"))
        for pull in (0.0, 30.0)
        for w in [ri(expert, toy.base, toy.heads, toy.inputs, own="north", encoder=toy.encoder, pull=pull, **KNOBS)]
    )
    assert near < 0.5 * far


def test_seen_through_other_names_and_picked_it_is_found_and_put_back(toy, adapters):
    adapted = Adapted(toy.base, Adapter(adapters["north"]))
    renamed = Renamed(adapted, {f"net.{n}": n for n in toy.base})
    view = Picked({n: (renamed, n) for n in renamed}, renamed)
    found = own_rank(view, ["net.0.weight", "net.3.weight"])
    (origin, low, scale) = found.unscaled("net.3.weight")
    torch.testing.assert_close(origin + scale * low.left @ low.right, view["net.3.weight"])
    changed = found.changed({"net.3.weight": low._replace(left=2 * low.left)})
    torch.testing.assert_close(changed["net.3.weight"] - origin, 2 * (view["net.3.weight"] - origin))
    assert torch.equal(changed["net.0.weight"], view["net.0.weight"])
    assert own_rank(view, ["net.0.weight", "net.0.bias"]) is None, "the adapter has no place for that bias"
    assert own_rank(toy.base, ["0.weight"]) is None


def test_every_kind_of_module_takes_its_own_factors_back(tmp_path, monkeypatch):
    """Embeddings, convolutions and turned matrices: what is put in with other factors comes out as their product."""
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "lora")
    from nets import KINDS, base, written

    for kind in ("plain", "rslora", "patterns", "embedding", "convolution", "lora_bias", "bias lora_only", "conv1d"):
        net = base(tmp_path / kind / "base", conv1d="conv1d" in kind)
        theta = {n: t.detach().clone() for n, t in net.state_dict().items()}
        written(tmp_path / kind / "adapter", net, KINDS[kind])
        expert = Adapted(theta, Adapter(tmp_path / kind / "adapter"))
        moved = [n for n in expert if not torch.equal(expert[n], theta[n])]
        found = own_rank(expert, moved)
        wanted, values = {}, {}
        for n in moved:
            if n in found.low:
                origin, low, scale = found.unscaled(n)
                values[n] = low._replace(left=low.left * 3)
                wanted[n] = origin + 3 * scale * (low.left @ low.right).reshape(origin.shape)
            else:
                values[n] = wanted[n] = expert[n] + 1
        changed = found.changed(values)
        for n in moved:
            torch.testing.assert_close(changed[n], wanted[n], msg=f"{kind}: {n}")


def test_co_adapted_adapters_stay_adapters_of_their_rank(toy, adapters, tmp_path):
    how = f"{HOW} | coadapt(steps=40, lr=0.003, batch=64)"
    both = adapt(toy, adapters, tmp_path, how)
    alone = adapt(toy, adapters, None)
    for name, folder in adapters.items():
        before, after = load_file(folder / FILES[0]), load_file(tmp_path / name / FILES[0])
        assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
        assert json.loads((tmp_path / name / CONFIG).read_text())["r"] == LORA.rank
        read = Adapted(toy.base, Adapter(tmp_path / name))
        assert all(torch.equal(read[n], both[name][n]) for n in toy.base)
    originals = {n: Adapted(toy.base, Adapter(f)) for n, f in adapters.items()}

    def off(experts):
        merged = merganser.merge(toy.base, experts, "task_arithmetic | scale(by=0.7)")
        data = {n: t.inputs for n, t in toy.tasks.items()}
        how = {"encoder": toy.encoder, "heads": toy.heads, "inputs": data, "reference": originals, "kind": "fp32"}
        return merganser.diagnose(toy.base, experts, merged, **how).total("merged")

    assert off(both) < off(alone)
