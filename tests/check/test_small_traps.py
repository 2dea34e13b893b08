"""Small things that went wrong without a word: each is said, or done as it was meant."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

import merganser
from merganser.errors import MerganserError, SentenceError, WeightsError

BASE = {"h[0].weight": torch.zeros(4, 4), "body.weight": torch.zeros(4, 4), "body.bias": torch.zeros(4)}
EXPERT = {name: tensor + 1 for name, tensor in BASE.items()}


def warnings_of(*args, **told):
    return " ".join(map(str, merganser.check(*args, **told).warnings))


def test_signs_of_a_glob_in_a_name_are_read_as_they_are():
    merged = merganser.merge(BASE, [EXPERT], "average", own=["h[0].weight"])
    assert torch.equal(merged["h[0].weight"], BASE["h[0].weight"])
    assert torch.equal(merged["body.weight"], EXPERT["body.weight"])
    merged = merganser.merge(BASE, [EXPERT], "average | scale", where={"h[0].weight": {"scale": {"by": 0.5}}})
    assert merged["h[0].weight"].eq(0.5).all()
    more = {**EXPERT, "x[1].a": torch.ones(2), "x[1].b": torch.ones(2)}
    with pytest.raises(WeightsError) as caught:
        merganser.merge(BASE, [more], "average")
    pattern = str(caught.value).partition("--own '")[2].partition("'")[0]
    assert set(merganser.merge(BASE, [more], "average", own=[pattern])) == set(BASE)


def test_a_model_given_twice_is_told(tmp_path):
    save_file(BASE, tmp_path / "base.safetensors")
    save_file(EXPERT, tmp_path / "a.safetensors")
    base, a = tmp_path / "base.safetensors", tmp_path / "a.safetensors"
    assert "is the same model as expert 'a-0'" in warnings_of(base, [a, a], "average")
    assert "is the same model as the base" in warnings_of(base, [a, base], "average")
    assert "is the same model as expert 'x'" in warnings_of(BASE, {"x": EXPERT, "y": EXPERT}, "average")
    assert "same model" not in warnings_of(base, {"x": a, "y": EXPERT}, "average")


@pytest.mark.parametrize(("how", "count"), [("consensus", 1), ("consensus(agree=5)", 3), ("average | scale(by=0)", 2)])
def test_a_sentence_that_takes_nothing_is_told(how, count):
    experts = [{n: t + k for n, t in EXPERT.items()} for k in range(count)]
    assert "takes nothing from" in warnings_of(BASE, experts, how)
    with pytest.warns(UserWarning, match="the result is the base itself"):
        merganser.merge(BASE, experts, how)


@pytest.mark.parametrize(
    "how", ["average", "trim(density=0.001) | ties", "dare(keep=0.01) | average", "consensus(agree=2)"]
)
def test_one_that_takes_little_is_not(how):
    assert "takes nothing" not in warnings_of(BASE, [EXPERT, {n: -t for n, t in EXPERT.items()}], how)


def test_what_is_no_model_and_no_sentence_is_told():
    with pytest.raises(WeightsError, match="'epoch' is no tensor but 3; weights map names to tensors"):
        merganser.merge({**BASE, "epoch": 3}, [EXPERT], "average")
    with pytest.raises(SentenceError, match="the sentence is text"):
        merganser.merge(BASE, [EXPERT], None)
    merged = merganser.merge(BASE, (one for one in [EXPERT, BASE]), "average")
    assert torch.equal(merged["body.bias"], EXPERT["body.bias"] / 2)


def test_an_empty_name_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SentenceError, match="no folder is given"):
        merganser.merge(BASE, [EXPERT], "average", into="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("told", "said"),
    [({"seed": "x"}, "seed must be a whole number"), ({"seed": True}, "seed must be a whole number"),
     ({"dtype": "flaot32", "shard_size": "x", "into": "out"}, "such as 5GB")],
)  # fmt: skip
def test_each_fault_is_told_for_itself(told, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert any(said in str(one) for one in merganser.check(BASE, [EXPERT], "average", **told).errors)
    with pytest.raises(MerganserError, match=said):
        merganser.merge(BASE, [EXPERT], "average", **told)


def test_one_path_is_no_list_of_experts():
    with pytest.raises(SentenceError, match="give a list of them"):
        merganser.merge(BASE, "some/expert", "average")
    assert not merganser.check(BASE, "some/expert", "average").ok
    merged = merganser.merge(BASE, [EXPERT], "average", own="body.*")  # one pattern alone is meant as one
    assert torch.equal(merged["body.bias"], BASE["body.bias"])


@pytest.mark.parametrize("where", ["own", "unmoved", "merged"])
def test_a_number_too_large_for_the_dtype_asked_for_is_named(where):
    base = {"w": torch.tensor([1.0, 70_000.0]), "v": torch.ones(2)}
    expert = {"w": base["w"] + (where == "merged"), "v": base["v"] + 1}
    own = ["w"] if where == "own" else []
    with pytest.raises(WeightsError, match=r"tensor 'w': a number does not fit torch\.float16"):
        merganser.merge(base, [expert], "average", own=own, dtype="float16")
    huge = {"w": torch.tensor([1e300, 1.0], dtype=torch.float64)}
    with pytest.raises(WeightsError, match=r"tensor 'w': a number does not fit torch\.float32"):
        merganser.merge(huge, [{"w": huge["w"] + 1}], "average", dtype="float32")


def test_a_result_inside_the_base_is_not_carried_into_the_next(tmp_path):
    base = tmp_path / "base"
    merganser.save(BASE, base)
    (base / "config.json").write_text("{}")
    merganser.save(EXPERT, tmp_path / "a")
    for _ in range(3):
        merganser.merge(base, [tmp_path / "a"], "average", into=base / "out")
    assert sorted(path.name for path in (base / "out").iterdir()) == [
        "README.md",
        "card.json",
        "config.json",
        "model.safetensors",
    ]


def test_two_models_in_one_folder_are_not_one_of_them(tmp_path):
    weights = {f"l.{k}": torch.randn(50, 50) for k in range(4)}
    merganser.merge(weights, [weights], "average", into=tmp_path / "m", shard_size="15kB")
    save_file(weights, tmp_path / "m" / "model.safetensors")
    with pytest.raises(WeightsError, match="two models, of which libraries read different ones"):
        merganser.merge(tmp_path / "m", [weights], "average")
    merganser.merge(tmp_path / "m" / "model.safetensors", [weights], "average")


def test_no_file_that_is_read_is_overwritten(tmp_path):
    merganser.save(BASE, tmp_path / "base")
    merganser.save(EXPERT, tmp_path / "a")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "model.safetensors").symlink_to(tmp_path / "a" / "model.safetensors")
    with pytest.raises(WeightsError, match="holds an input"):
        merganser.merge(tmp_path / "base", [tmp_path / "linked"], "average", into=tmp_path / "a")
    modules = {"w": torch.zeros(2), "2_Dense/w": torch.zeros(2)}
    for who in ("st", "st-a"):
        merganser.save({n: t + (who == "st-a") for n, t in modules.items()}, tmp_path / who)
    with pytest.raises(WeightsError, match="holds an input"):
        merganser.merge(tmp_path / "st", [tmp_path / "st-a"], "average", into=tmp_path / "st-a" / "2_Dense")


def test_parts_of_copies_are_parts_of_one_merge(tmp_path):
    from merganser.weights.parts import join

    for place in ("one", "two"):
        merganser.save(BASE, tmp_path / place / "base")
        merganser.save(EXPERT, tmp_path / place / "a")
    shutil.copystat(tmp_path / "one", tmp_path / "two")
    out = tmp_path / "out"
    merganser.merge(tmp_path / "one" / "base", {"a": tmp_path / "one" / "a"}, "ties", into=out, part=(1, 3))
    merganser.merge(tmp_path / "two" / "base", {"a": tmp_path / "two" / "a"}, "ties", into=out, part=(2, 3))
    merganser.merge(BASE, {"a": EXPERT}, "ties", into=out, part=(3, 3))
    joined = join(out)
    wanted = merganser.merge(BASE, {"a": EXPERT}, "ties")
    assert all(torch.equal(joined[n], wanted[n]) for n in wanted)
    other = {n: t + 1e-3 for n, t in EXPERT.items()}
    merganser.merge(BASE, {"a": EXPERT}, "ties", into=tmp_path / "mixed", part=(1, 2))
    merganser.merge(BASE, {"a": other}, "ties", into=tmp_path / "mixed", part=(2, 2))
    with pytest.raises(WeightsError, match="different jobs"):
        join(tmp_path / "mixed")
