"""The loop: memory and disk give the same bytes, seeds and rules hold, faults stop it and leave nothing behind."""

import pytest
import torch
from sentences import SENTENCES, given_to

import merganser
from merganser.card import digest, read_card
from merganser.errors import SentenceError, WeightsError
from merganser.fingerprint import fingerprint
from merganser.sentence import parse
from merganser.weights.open import open_weights


@pytest.fixture
def models():
    rng = torch.Generator().manual_seed(3)
    base = {
        "embed.weight": torch.randn(11, 6, generator=rng),
        "layer.weight": torch.randn(8, 6, generator=rng).bfloat16(),
        "layer.bias": torch.randn(8, generator=rng).half(),
        "conv.weight": torch.randn(4, 3, 2, 2, generator=rng),
        "norm.weight": torch.randn(6, generator=rng),
        "scalar": torch.tensor(0.5),
        "frozen.weight": torch.randn(3, 3, generator=rng),
        "position_ids": torch.arange(7),
    }
    experts = {}
    for name in ("a", "b", "c"):
        experts[name] = {
            n: t
            if n in ("position_ids", "frozen.weight")
            else (t.float() + 0.1 * torch.randn(t.shape, generator=rng)).to(t.dtype)
            for n, t in base.items()
        }
    return base, experts


@pytest.mark.parametrize("how", [*SENTENCES, "della(density=0.5) | average"])
def test_a_seed_changes_only_what_says_that_it_draws(models, how):
    base, experts = models
    experts, ingredients = given_to(how, base, experts)
    one, other = (merganser.merge(base, experts, how, seed=seed, ingredients=ingredients) for seed in (0, 1))
    same = all(torch.equal(one[n], other[n]) for n in base)
    assert same != parse(how).draws


def test_what_is_drawn_in_a_survey_or_by_your_own_step_counts(tmp_path):
    (tmp_path / "mine.py").write_text("def mean(deltas):\n    return deltas.mean(0)\n")
    assert parse("permute | average").draws
    assert parse(f"{tmp_path}/mine.py:mean").draws, "nobody knows"


@pytest.mark.parametrize("how", SENTENCES)
def test_memory_disk_and_parts_give_the_same_bytes(models, tmp_path, how):
    base, experts = models
    experts, ingredients = given_to(how, base, experts)
    for name, weights in {"base": base, **experts}.items():
        merganser.save(weights, tmp_path / name)
    sources = {name: tmp_path / name for name in experts}
    given = {"seed": 7, "ingredients": ingredients}
    memory = merganser.merge(base, experts, how, **given)
    disk = merganser.merge(tmp_path / "base", sources, how, into=tmp_path / "out", **given)
    for k in (3, 1, 2):
        merganser.merge(tmp_path / "base", sources, how, into=tmp_path / "parts", part=(k, 3), **given)
    joined = merganser.join(tmp_path / "parts")
    assert set(memory) == set(base)
    assert digest(memory) == digest(disk) == digest(joined)
    shards = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("out", "parts")]
    assert shards[0] == shards[1], "not only the tensors, the very file"
    cards = [read_card(tmp_path / folder) for folder in ("out", "parts")]
    assert all(cards[0][k] == cards[1][k] for k in ("kind", "sentence", "inputs", "seed", "base", "key"))
    assert sorted(p.name for p in (tmp_path / "parts").iterdir()) == ["README.md", "card.json", "model.safetensors"]
    assert all(memory[n].dtype == base[n].dtype and memory[n].shape == base[n].shape for n in base)
    assert all(torch.equal(memory[n], base[n]) for n in ("frozen.weight", "position_ids"))
    assert digest(base) == digest(open_weights(tmp_path / "base")), "inputs must stay as they were"


def test_the_order_of_tensors_does_not_matter(models):
    base, experts = models
    turned = {n: base[n] for n in reversed(base)}
    how = "dare(keep=0.5) | ties"
    assert digest(merganser.merge(base, experts, how)) == digest(merganser.merge(turned, experts, how))
    assert digest(merganser.merge(base, experts, how)) != digest(merganser.merge(base, experts, how, seed=1))


def test_task_arithmetic_is_the_formula(models):
    base, experts = models
    merged = merganser.merge(base, experts, "task_arithmetic | scale(by=0.3)")
    want = base["embed.weight"] + 0.3 * sum(e["embed.weight"] - base["embed.weight"] for e in experts.values())
    torch.testing.assert_close(merged["embed.weight"], want)


def test_the_base_and_one_expert_are_fixed_points(models):
    base, experts = models
    assert digest(merganser.merge(base, {"a": base, "b": base}, "ties")) == digest(base)
    once = merganser.merge(base, {"a": experts["a"]}, "task_arithmetic")
    for name in base:
        torch.testing.assert_close(once[name], experts["a"][name], rtol=1e-6, atol=1e-6)


def test_whole_model_ties_equals_ties_of_the_flat_vector(models):
    from merganser.steps.combine.ties import ties

    base, experts = models
    names = [n for n in base if base[n].is_floating_point() and n != "frozen.weight"]
    flat = torch.stack(
        [torch.cat([(e[n].float() - base[n].float()).reshape(-1) for n in names]) for e in experts.values()]
    )
    want = ties(flat, density=0.3)
    merged = merganser.merge(base, experts, "ties(density=0.3)")
    at = 0
    for name in names:
        part = want[at : at + base[name].numel()].reshape(base[name].shape)
        assert torch.equal(merged[name], (base[name].float() + part).to(base[name].dtype)), name
        at += base[name].numel()


def test_own_tensors_are_left_out(models):
    base, experts = models
    with_head = {n: {**w, "head.weight": torch.ones(k + 1)} for k, (n, w) in enumerate(experts.items())}
    merged = merganser.merge(base, with_head, "average", own=["head.*"])
    assert digest(merged) == digest(merganser.merge(base, experts, "average"))


def test_functions_are_steps_too(models):
    base, experts = models

    def halfway(deltas):
        return deltas.mean(dim=0)

    assert digest(merganser.merge(base, experts, [halfway])) == digest(merganser.merge(base, experts, "average"))
    with pytest.raises(SentenceError, match="first argument is called"):
        merganser.merge(base, experts, [lambda x: x])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stop_it_and_leave_nothing(models, tmp_path, bad):
    base, experts = models
    experts["b"]["norm.weight"][2] = bad
    with pytest.raises(WeightsError, match=r"expert 'b' has NaN or inf in tensor 'norm.weight'"):
        merganser.merge(base, experts, "average", into=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("ties(density=50)", "density"),
        ("ties(densty=0.5)", "no knob 'densty' (did you mean 'density'?)"),
        ("teis", "unknown step 'teis' (did you mean 'ties'?)"),
        ("scale(by=2.0)", "has none; a sentence needs exactly one combining step"),
        ("ties | average", "has 2 (ties, average)"),
        ("ties(0.2)", "knobs are given by name"),
        ("ties(density=x)", "is not a plain value"),
        ("ties | ", "cannot read"),
        ("ties | ri", "adapt steps come first"),
        ("ri | ties", "use adapt() first, or run()"),
        ("__import__('os').system('true') | ties", "is not a step"),
        ("dare(keep=0.0) | ties", "keep"),
    ],
)
def test_bad_sentences_are_told_before_any_tensor_is_read(models, how, says):
    base, experts = models

    with pytest.raises(SentenceError) as error:
        merganser.merge(base, experts, how)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_input_is_never_overwritten(models, tmp_path):
    base, experts = models
    merganser.save(base, tmp_path / "base")
    (tmp_path / "base" / "model_backup.safetensors").write_bytes(b"mine")
    for into in (tmp_path / "base", tmp_path / "base" / ".." / "base"):
        with pytest.raises(WeightsError, match="holds an input"):
            merganser.merge(tmp_path / "base", experts, "average", into=into)
    merganser.save(experts["a"], tmp_path / "base")
    assert (tmp_path / "base" / "model_backup.safetensors").read_bytes() == b"mine", "only our own shards are replaced"


def test_the_folder_loads_elsewhere_and_says_how_it_came_to_be(models, tmp_path):
    import json

    base, experts = models
    merganser.save(base, tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "1_Pooling").mkdir()
    (tmp_path / "base" / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"x")
    merganser.merge(tmp_path / "base", experts, "ties", into=tmp_path / "out")
    names = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {"model.safetensors", "config.json", "1_Pooling/config.json", "card.json", "README.md"}
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["sentence"] == "ties"
    assert card["inputs"]["base"] == fingerprint(base)
    assert "base_model_relation: merge" in (tmp_path / "out" / "README.md").read_text()
