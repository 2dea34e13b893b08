"""What comes out: dtypes, stored deltas, statistics, whatever the number of threads; what cannot be is named."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import merganser
from merganser.card import digest, read_card
from merganser.errors import SentenceError, WeightsError
from merganser.fingerprint import fingerprint
from merganser.loop import CUT
from merganser.parallel import one_thread_each


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = {"big.weight": (300, 500), "small.weight": (7, 5), "norm.bias": (9,)}
    return {name: torch.randn(shape, generator=rng).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def models() -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    return model(0), {"a": model(1), "b": model(2)}


def test_the_result_has_the_bases_dtype_or_the_one_asked_for(models):
    base, experts = model(0, torch.bfloat16), models[1]
    exact = merganser.merge({n: t.float() for n, t in base.items()}, experts, "average")
    wide = merganser.merge(base, experts, "average", dtype="float32")
    narrow = merganser.merge(base, experts, "average")
    for name in base:
        assert (wide[name].dtype, narrow[name].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(wide[name], exact[name])
        assert torch.equal(narrow[name], exact[name].bfloat16())
    with pytest.raises(SentenceError, match="did you mean 'bfloat16'"):
        merganser.merge(base, experts, "average", dtype="bflot16")


def test_a_stored_delta_gives_the_model_back_and_merges_on(models, tmp_path):
    base, experts = models
    base = base | {"frozen.weight": torch.randn(3, 3), "counter": torch.tensor(3)}
    experts = {e: w | {"frozen.weight": base["frozen.weight"], "counter": base["counter"]} for e, w in experts.items()}
    delta = merganser.merge(base, experts, "ties(density=0.5)", into=tmp_path / "delta", stored="delta")
    whole = merganser.merge(base, experts, "ties(density=0.5)")
    assert set(delta) == {n for n in base if n != "counter"}
    assert not delta["frozen.weight"].any()
    assert all(torch.equal(base[n] + delta[n], whole[n]) for n in delta)
    again = merganser.merge(base, {"d": tmp_path / "delta"}, "task_arithmetic")
    for name in base:
        torch.testing.assert_close(again[name], whole[name])
    assert read_card(tmp_path / "delta")["kind"] == "delta"


def test_statistics_of_batch_norm_are_averaged_whatever_the_sentence(models):
    base, experts = models
    rng = torch.Generator().manual_seed(9)
    for weights in (base, *experts.values()):
        weights["bn.running_var"] = torch.rand(8, generator=rng) + 0.1
        weights["bn.running_mean"] = torch.randn(8, generator=rng)
        weights["bn.num_batches_tracked"] = torch.tensor(7)
    merged = merganser.merge(base, experts, "ties(density=0.2) | scale(by=5.0)")
    for name in ("bn.running_var", "bn.running_mean"):
        torch.testing.assert_close(merged[name], (experts["a"][name] + experts["b"][name]) / 2)
    assert merged["bn.num_batches_tracked"] == 7


def test_a_number_that_does_not_fit_fp16_is_named(models):
    base = {"w": torch.full((4,), 60000.0, dtype=torch.float16)}
    expert = {"w": torch.full((4,), 62048.0, dtype=torch.float16)}
    with pytest.raises(WeightsError, match="tensor 'w': a number does not fit"):
        merganser.merge(base, {"a": expert}, "task_arithmetic | scale(by=10.0)")
    assert merganser.merge(base, {"a": expert}, "task_arithmetic | scale(by=10.0)", dtype="float32")["w"][0] == 80480


def test_a_step_that_makes_nan_is_named(models):
    def broken(deltas):
        return deltas.sum(0).log()

    with pytest.raises(SentenceError, match="broken: makes NaN or inf in tensor"):
        merganser.merge(*models, [broken])


def test_fp64_stays_exact(models):
    base = {"w": torch.tensor([1.0, 1.0 + 2**-40], dtype=torch.float64)}
    expert = {"w": base["w"] + 2**-45}
    assert torch.equal(merganser.merge(base, {"a": expert}, "average")["w"], expert["w"])


@pytest.mark.parametrize("how", ["dare(keep=0.5) | ties(density=0.3)", "tsv", "slerp", "della | average"])
def test_threads_do_not_change_a_bit(models, how):
    many = {f"layers.{k}.{n}": t for k in range(4) for n, t in model(10 + k).items()}
    experts = {e: {n: t + 0.01 * torch.randn_like(t) for n, t in many.items()} for e in "ab"}
    one = merganser.merge(many, experts, how)
    torch.set_num_threads(3)
    try:
        assert digest(merganser.merge(many, experts, how)) == digest(one)
        with one_thread_each() as workers:
            assert (workers, torch.get_num_threads()) == (3, 1)
    finally:
        torch.set_num_threads(1)


def test_cuts_draw_what_the_whole_draws():
    """A tensor of several cuts gets the dice of one: what a person repeats with one call of the step."""
    from merganser.job import generator
    from merganser.steps.edit.dare import dare

    base = {"w": torch.zeros(3 * CUT + 17)}
    merged = merganser.merge(base, {"a": {"w": torch.ones(3 * CUT + 17)}}, "dare(keep=0.25) | average", seed=4)
    drawn = dare(torch.ones(3 * CUT + 17), keep=0.25, rng=generator(4, "w", "a"))
    assert torch.equal(merged["w"], drawn)
    assert drawn.unique().tolist() == [0, 4]


def test_a_second_dare_throws_other_dice(models):
    ones = {"w": torch.ones(40_000)}
    merged = merganser.merge({"w": torch.zeros(40_000)}, {"a": ones}, "dare(keep=0.5) | dare(keep=0.5) | average")
    assert abs((merged["w"] != 0).float().mean() - 0.25) < 0.02


def test_fingerprints_are_those_of_the_inputs_however_they_are_read(models, tmp_path):
    base, experts = models
    for name, weights in {"base": base, **experts}.items():
        merganser.save(weights, tmp_path / name)
    for how in ("average", "ties", "tsv"):
        merganser.merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], how, into=tmp_path / "out")
        told = read_card(tmp_path / "out")["inputs"]
        assert told == {name: fingerprint(w) for name, w in {"base": base, **experts}.items()}
    other = {n: t.clone() for n, t in base.items()}
    other["big.weight"][0, 3] += 1
    assert fingerprint(other) != fingerprint(base)


STEP = """
ELEMENTWISE = True

def strongest(deltas, *, share=1.0):
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share!r}")
    return deltas.abs().amax(dim=0) * share
"""


def test_a_step_from_a_file(models, tmp_path):
    (tmp_path / "mine.py").write_text(STEP)
    base, experts = models
    merged = merganser.merge(base, experts, f"{tmp_path}/mine.py:strongest(share=0.5) | scale(by=2.0)")
    want = torch.stack([experts[e]["big.weight"] - base["big.weight"] for e in "ab"]).abs().amax(0)
    torch.testing.assert_close(merged["big.weight"], base["big.weight"] + want)
    for text, says in [
        (f"{tmp_path}/mine.py:strangest", "did you mean 'strongest'"),
        (f"{tmp_path}/yours.py:strongest", "no such file"),
        (f"{tmp_path}/mine.py:strongest(shar=0.5)", "did you mean 'share'"),
        (f"{tmp_path}/mine.py:strongest(share=2.0)", "share must lie in"),
    ]:
        with pytest.raises(SentenceError, match=says):
            merganser.merge(base, experts, text)


def test_a_step_from_an_entry_point(tmp_path):
    (tmp_path / "theirs.py").write_text(STEP)
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[merganser.steps]\nstrongest = theirs:strongest\n")
    code = (
        "import torch, merganser; w = merganser.merge({'w': torch.zeros(3)}, [{'w': torch.tensor([1., -2., 0.])}], "
        "'strongest(share=0.5)')['w'].tolist(); assert w == [0.5, 1.0, 0.0], w"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_ingredients_are_asked_for_and_checked(models, tmp_path):
    base, experts = models
    with pytest.raises(SentenceError, match="needs the ingredient 'fisher'"):
        merganser.merge(base, experts, "fisher")
    with pytest.raises(SentenceError, match="no step of 'average' takes an ingredient 'fisher'"):
        merganser.merge(base, experts, "average", ingredients={"fisher": base})
    with pytest.raises(SentenceError, match="has nothing for expert 'b'"):
        merganser.merge(base, experts, "fisher", ingredients={"fisher": {"a": base}})
    squares = {e: {n: t.square() for n, t in w.items()} for e, w in experts.items()}
    for expert, weights in squares.items():
        merganser.save(weights, tmp_path / "fisher" / expert)
    memory = merganser.merge(base, experts, "fisher", ingredients={"fisher": squares})
    disk = merganser.merge(base, experts, "fisher", ingredients={"fisher": tmp_path / "fisher"})
    assert digest(memory) == digest(disk)


def test_a_shared_mask_covers_the_merged_delta(models):
    base, experts = models
    mask = {"big.weight": (torch.arange(150_000).reshape(300, 500) % 2).float()}
    merged = merganser.merge(base, experts, "average | mask", ingredients={"mask": mask})
    average = merganser.merge(base, experts, "average")
    want = torch.where(mask["big.weight"] == 1, average["big.weight"], base["big.weight"])
    torch.testing.assert_close(merged["big.weight"], want)
    assert torch.equal(merged["small.weight"], average["small.weight"])


def test_nobody_else_is_called_base(models, tmp_path):
    base, experts = models
    with pytest.raises(WeightsError, match="cannot be called 'base'"):
        merganser.merge(base, {"base": experts["a"]}, "average")
    merganser.save(base, tmp_path / "one" / "base")
    merganser.save(experts["a"], tmp_path / "two" / "base")
    merganser.merge(tmp_path / "one" / "base", [tmp_path / "two" / "base"], "average", into=tmp_path / "out")
    assert read_card(tmp_path / "out")["inputs"] == {"base": fingerprint(base), "base-model": fingerprint(experts["a"])}


def test_an_edit_that_changes_the_shape_is_named(models):
    def flat(delta):
        return delta.flatten()[:1]

    with pytest.raises(SentenceError, match=r"flat: gives shape \[1\]"):
        merganser.merge(*models, [flat, "average"])
