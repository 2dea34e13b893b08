"""What can be opened, and the rules by which base and experts that nearly match are made to match."""

import json
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import merganser
from merganser.errors import WeightsError
from merganser.weights.delta import over
from merganser.weights.header import Headers, Picked, header
from merganser.weights.match import check_match, match
from merganser.weights.open import named, open_weights
from merganser.weights.pickled import Pickled, find_pickles
from merganser.weights.renamed import Renamed
from merganser.weights.stored import INDEX, Stored
from merganser.weights.tied import canonical, same, tied_copy


class Hostile:
    """A pickle that leaves a file behind when it is read by a careless reader."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def tensors(seed=0, **shapes):
    rng = torch.Generator().manual_seed(seed)
    shapes = shapes or {"embed.weight": (6, 4), "body.weight": (4, 4), "norm.bias": (4,)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def equal(a, b):
    return set(a) == set(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in b)


# pickles


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_of_tensors_is_read_by_its_file_or_folder(tmp_path, suffix, new):
    told = {**tensors(), "half": torch.randn(3).bfloat16(), "count": torch.tensor(7)}
    torch.save(OrderedDict(told), tmp_path / f"some{suffix}", _use_new_zipfile_serialization=new)
    for opened in (open_weights(tmp_path), open_weights(str(tmp_path / f"some{suffix}"))):
        assert isinstance(opened, Pickled)
        assert equal(opened, told)
    assert header(opened, "half") == ("BF16", (3,))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux")
def test_a_pickle_is_mapped_not_copied(tmp_path):
    torch.save({"a": torch.zeros(30_000_000), "b": torch.ones(2)}, tmp_path / "big.pt")
    code = (
        "import torch; from merganser import open_weights\n"
        "def held(): return next(int(s.split()[1]) for s in open('/proc/self/status') if s.startswith('RssAnon'))\n"
        "before = held()\n"
        f"w = open_weights({str(tmp_path / 'big.pt')!r}); assert w['a'].shape == (30_000_000,) and w['b'].sum() == 2\n"
        "print(held() - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 60_000  # KiB; the file has 120 MB


@pytest.mark.parametrize("key", ["state_dict", "model", "module"])
def test_a_wrapped_state_dict_is_taken_out_and_its_names_stay(tmp_path, key):
    told = {f"module.{n}": t for n, t in tensors().items()}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({key: told, "epoch": 3, "name": "run", "optimizer_states": [optimizer]}, tmp_path / "last.ckpt")
    assert equal(open_weights(tmp_path / "last.ckpt"), told)


def test_what_is_not_plainly_the_model_is_an_error(tmp_path):
    def says(match, value):
        torch.save(value, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=match):
            open_weights(tmp_path / "x.pt")

    says("under 'model' and under 'model_ema': which is the model", {"model": tensors(), "model_ema": tensors(1)})
    says("'state_dict' is a dict beside tensors", {"state_dict": tensors(), "extra": torch.ones(2)})
    says("'args' is a dict beside tensors", {**tensors(), "args": {"lr": 1}})
    says("no tensors by name, only 'epoch', 'net'", {"epoch": 1, "net": tensors()})
    says("holds a list", [torch.ones(1)])
    says("sparse", {"a": torch.eye(3).to_sparse()})
    torch.save({**tensors(), "version": "1.0", "step": 5, "note": None}, tmp_path / "x.pt")
    assert equal(open_weights(tmp_path / "x.pt"), tensors())


@pytest.mark.parametrize("new", [True, False])
def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path, new):
    mark = tmp_path / "executed"
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "pytorch_model.bin"
    torch.save({"a": torch.ones(2), "b": Hostile(mark)}, file, _use_new_zipfile_serialization=new)
    for source in (file, tmp_path / "model"):
        with pytest.raises(WeightsError, match=r"refused, and nothing in it was run: this pickle wants 'posix.system'"):
            open_weights(source)
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "the pickle must be one that does harm"


def test_other_pickles_are_refused_or_named_as_damaged(tmp_path):
    mark = tmp_path / "executed"
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Hostile(mark)))
    (tmp_path / "junk.bin").write_bytes(b"\x80\x04")
    (tmp_path / "empty.bin").write_bytes(b"")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save(tensors(), tmp_path / "cut.bin")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "cut.bin").read_bytes()[:-200])
    for name, said in {
        "raw.pkl": "refused, and nothing in it was run",
        "junk.bin": "cut short",
        "empty.bin": "cut short",
        "cut.bin": "cut short",
        "module.pt": "wants 'torch.nn.modules.linear.Linear'",
    }.items():
        with pytest.raises(WeightsError, match=said):
            open_weights(tmp_path / name)
    assert not mark.exists()


def test_sharded_pickles_and_the_order_of_preference(tmp_path):
    told = tensors()
    names = list(told)
    torch.save({n: told[n] for n in names[:1]}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({n: told[n] for n in names[1:]}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {n: f"pytorch_model-0000{1 if k == 0 else 2}-of-00002.bin" for k, n in enumerate(names)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"x": 1}, tmp_path / "training_args.bin")
    assert equal(open_weights(tmp_path), told)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(WeightsError, match=r"names pytorch_model-00002-of-00002.bin, which is missing"):
        open_weights(tmp_path)
    save_file(tensors(1), tmp_path / "model.safetensors")
    assert isinstance(open_weights(tmp_path), Stored)
    assert equal(open_weights(tmp_path), tensors(1))


def test_a_trainers_leftovers_are_no_model_and_two_pickles_are_no_choice(tmp_path):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "scaler.pt"):
        torch.save({"x": torch.ones(1)}, tmp_path / name)
    assert find_pickles(tmp_path) == []
    torch.save(tensors(), tmp_path / "weights.pt")
    assert equal(open_weights(tmp_path), tensors())
    torch.save(tensors(), tmp_path / "other.pt")
    with pytest.raises(WeightsError, match=r"several pickles \(other.pt, weights.pt\)"):
        open_weights(tmp_path)


def test_modules_of_sentence_transformers_are_read_with_a_pickled_model(tmp_path):
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}, {"path": "3_Dense"}]))
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    for name in ("2_Dense", "3_Dense"):
        (tmp_path / name).mkdir()
    torch.save({"linear.weight": torch.ones(2, 2)}, tmp_path / "2_Dense" / "pytorch_model.bin")
    save_file({"linear.weight": torch.zeros(2, 2)}, tmp_path / "3_Dense" / "model.safetensors")
    opened = open_weights(tmp_path)
    assert set(opened) == {*tensors(), "2_Dense/linear.weight", "3_Dense/linear.weight"}
    assert opened["2_Dense/linear.weight"].sum() == 4


def test_a_merge_of_pickles_is_the_merge_of_their_tensors(tmp_path):
    base, one, two = tensors(0), tensors(1), tensors(2)
    for name, weights in {"base": base, "one": one, "two": two}.items():
        (tmp_path / name).mkdir()
        torch.save(weights, tmp_path / name / "pytorch_model.bin")
    merged = merganser.merge(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], "average")
    assert equal(dict(merged), dict(merganser.merge(base, [one, two], "average")))


def test_names_keep_dots_and_lose_only_what_is_no_name():
    assert list(named(["m/Llama-3.1-8B", "m/x.safetensors", "org/name@v1.0"])) == ["Llama-3.1-8B", "x", "name"]


# tied copies


def models(**changes):
    base = tensors(0, **{"embed.weight": (6, 4), "head.weight": (6, 4), "body.weight": (4, 4), "a.bias": (4,)})
    base["head.weight"] = base["embed.weight"].clone()
    expert = {n: t + 0.1 for n, t in base.items()}
    expert["head.weight"] = expert["embed.weight"].clone()
    return base, expert


@pytest.mark.parametrize("place", ["memory", "disk", "renamed"])
def test_a_tied_copy_that_only_the_base_has_is_taken_from_its_twin(tmp_path, place):
    base, expert = models()
    del expert["head.weight"]
    base, expert = placed(tmp_path, place, base, expert)
    found = match(base, {"x": expert})
    assert found.names == list(base)
    assert torch.equal(found.experts["x"]["head.weight"], expert["embed.weight"])
    assert header(found.experts["x"], "head.weight") == ("F32", (6, 4))
    assert found.alike == {pair[1]: pair[0] for pair in [[n for n in base if n in ("embed.weight", "head.weight")]]}


@pytest.mark.parametrize("place", ["memory", "disk", "renamed"])
def test_a_tied_copy_that_only_the_expert_has_is_left_out(tmp_path, place):
    base, expert = models()
    del base["head.weight"]
    base, expert = placed(tmp_path, place, base, expert)
    assert match(base, {"x": expert}).names == list(base)
    untied = {**{n: expert[n] for n in expert}, "head.weight": expert["head.weight"] * 2}
    with pytest.raises(WeightsError, match=r"has, and the base lacks, 'head.weight'"):
        match(base, {"x": untied})


def placed(folder, place, *models):
    if place == "disk":
        return [merganser.save(weights, folder / str(k)) for k, weights in enumerate(models)]
    if place == "renamed":
        return [Renamed({f"m.{n}": t for n, t in w.items()}, {n: f"m.{n}" for n in w}) for w in models]
    return models


def test_untied_or_equal_by_chance_is_no_tie():
    base, expert = models()
    base["head.weight"] = base["head.weight"] + 1
    del expert["head.weight"]
    with pytest.raises(WeightsError, match=r"expert 'x' lacks 'head.weight'"):
        match(base, {"x": expert})
    # a fresh head's bias is zero, and so may be another bias: that is no sign of anything
    fresh = {"embed.weight": torch.randn(3, 4), "a.bias": torch.zeros(4)}
    with pytest.raises(WeightsError, match=r"has, and the base lacks, 'classifier.bias'"):
        match(fresh, {"x": {**fresh, "classifier.bias": torch.zeros(4)}})
    # the very same memory is one
    assert match(fresh, {"x": {**fresh, "classifier.bias": fresh["a.bias"]}}).names == list(fresh)


def test_ties_are_of_bytes():
    nan = torch.tensor([1.0, float("nan")])
    assert same({"a": nan, "b": nan.clone()}, "a", "b")
    assert not same({"a": torch.tensor([0.0, 1]), "b": torch.tensor([-0.0, 1])}, "a", "b")
    assert not same({"a": torch.zeros(2, 3), "b": torch.zeros(3, 2)}, "a", "b")
    assert not same({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.int32)}, "a", "b")
    long = torch.zeros(10_000)
    other = long.clone()
    other[4000] = 1e-30  # between the places where samples are taken
    assert not same({"a": long, "b": other}, "a", "b")


def test_random_numbers_are_shared_where_every_model_is_tied():
    base, expert = models()
    assert canonical(base, {"x": expert, "y": expert}) == {"head.weight": "embed.weight"}
    untied = {**expert, "head.weight": expert["head.weight"] + 1e-3}
    assert canonical(base, {"x": expert, "y": untied}) == {}
    fresh = {n: torch.ones(6) for n in "ab"}
    assert canonical(fresh, {"x": fresh, "y": fresh}) == {}  # two fresh norms
    assert canonical(fresh, {"x": {n: torch.arange(6.0) for n in "ab"}}) == {"b": "a"}
    three = {n: torch.arange(6.0) for n in "abc"}
    assert canonical(three, {"x": three}) == {"b": "a", "c": "a"}


def test_an_expert_may_be_tied_by_its_config_where_the_base_is_not(tmp_path):
    base, expert = models()
    base["head.weight"] = base["head.weight"] + 1.0  # an output layer of its own
    del expert["head.weight"]
    for who, weights in (("base", base), ("x", expert)):
        merganser.save(weights, tmp_path / who)
    (tmp_path / "x" / "config.json").write_text('{"tie_word_embeddings": false}')
    with pytest.raises(WeightsError, match=r"lacks 'head\.weight'"):
        merganser.merge(tmp_path / "base", [tmp_path / "x"], "average")
    for said in ('{"tie_word_embeddings": true}', '{"text_config": {"tie_word_embeddings": true}}'):
        (tmp_path / "x" / "config.json").write_text(said)
        merged = merganser.merge(tmp_path / "base", [tmp_path / "x"], "average")
        torch.testing.assert_close(merged["head.weight"], expert["embed.weight"])


def test_a_check_reads_no_tensor_to_tell_what_is_tied(tmp_path, monkeypatch):
    """By config.json; by shape alone with a warning, which merging then finds true or not."""
    base, expert = models()
    less = {n: t for n, t in expert.items() if n != "head.weight"}
    for who, weights in (("base", base), ("x", expert), ("less", less)):
        merganser.save(weights, tmp_path / who)
    rows = len(base["embed.weight"])
    others = [tmp_path / "x", tmp_path / "less"]
    read = []
    monkeypatch.setattr(Stored, "__getitem__", lambda self, name: read.append(name))

    def said() -> str:
        found = merganser.check(tmp_path / "base", others, "dare | ties")
        assert found.ok
        assert not read
        return " ".join(one.what for one in (*found.warnings, *found.notes))

    assert "lacks 'head.weight', by its shape a tied copy of 'embed.weight'" in said()
    assert "is tied to" not in said()
    for who in ("base", "x", "less"):
        (tmp_path / who / "config.json").write_text(f'{{"tie_word_embeddings": true, "vocab_size": {rows}}}')
    assert "by its shape" not in said()
    assert "'head.weight' is tied to 'embed.weight' in every model, as their config.json says" in said()


def test_one_of_several_tables_is_taken_for_a_copy_where_the_config_has_their_rows(tmp_path):
    """As in T5: shared, encoder's, decoder's embedding and output layer; of square matrices none is."""
    base = {n: torch.randn(9, 4) for n in ("shared", "encoder.embed", "decoder.embed")} | {
        n: torch.randn(4, 4) for n in "abc"
    }
    merganser.save(base, tmp_path / "base")
    for lacks, ok in (("encoder.embed", True), ("b", False)):
        merganser.save({n: t + 1 for n, t in base.items() if n != lacks}, tmp_path / lacks)
        (tmp_path / "base" / "config.json").write_text('{"vocab_size": 9}')
        assert merganser.check(tmp_path / "base", [tmp_path / lacks], "average").ok == ok
        with pytest.raises(WeightsError, match=f"lacks '{lacks}'"):  # the bytes tell that it is none
            merganser.merge(tmp_path / "base", [tmp_path / lacks], "average")


def test_a_random_merge_of_tied_models_is_tied():
    base, expert = models()
    second = {n: t * 1.5 for n, t in expert.items() if n != "head.weight"}
    merged = merganser.merge(base, {"x": expert, "y": second}, "dare(keep=0.5) | task_arithmetic", seed=3)
    assert torch.equal(merged["head.weight"], merged["embed.weight"])
    assert not torch.equal(merged["embed.weight"], base["embed.weight"])


def test_headers_alone_take_the_only_candidate_for_the_tie():
    base, expert = models()
    heads = Headers({n: header(expert, n) for n in expert if n != "head.weight"}, "org/name")
    known = Headers({n: header(base, n) for n in base}, "org/base")
    assert tied_copy(known, "head.weight", heads) == "embed.weight"
    assert match(known, {"x": heads}).names == list(base)
    with pytest.raises(WeightsError, match="only its headers were read"):
        heads["embed.weight"]
    with pytest.raises(KeyError):
        heads["nothing"]


# everything else that may differ


def test_all_that_is_wrong_with_all_experts_is_said_at_once():
    base = tensors()
    experts = {
        "one": {n: t for n, t in base.items() if n != "body.weight"},
        "two": {**base, "head.weight": torch.randn(2, 4), "head.bias": torch.randn(2)},
        "three": {**base, "head.weight": torch.randn(3, 4), "head.bias": torch.randn(3)},
        "four": {**base, "norm.bias": torch.zeros(5)},
        "five": {**base, "body.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)},
    }
    with pytest.raises(WeightsError) as error:
        check_match(base, experts)
    text = str(error.value)
    assert "\n" not in text
    for part in (
        "expert 'one' lacks 'body.weight'",
        "each of 'two', 'three' has, and the base lacks, 'head.weight', 'head.bias'",
        "expert 'four' has other shapes: 'norm.bias' [5] instead of [4]",
        "expert 'five' has tensors of dtype F8_E4M3, which cannot be merged: 'body.weight'",
        'own=["body.*", "head.*"]',
    ):
        assert part in text, text
    assert check_match(base, {k: experts[k] for k in ("two", "three")}, ["head.*"]) == list(base)


def test_the_hint_leaves_out_nothing_else():
    base = {"bert.layer.0.weight": torch.randn(2), "bert.layer.1.weight": torch.randn(2)}
    more = {**base, "bert.pooler.dense.weight": torch.randn(3), "bert.pooler.dense.bias": torch.randn(3)}
    with pytest.raises(WeightsError, match=r'--own .bert.pooler.\*. \(own=\["bert.pooler.\*"\]\)$'):
        check_match(base, {"x": more})
    assert check_match(base, {"x": more}, ["bert.pooler.*"]) == list(base)


def test_dtypes_may_differ_and_the_result_has_the_bases():
    base = tensors()
    half = {n: (t + 0.5).bfloat16() for n, t in base.items()}
    double = {n: (t + 0.25).double() for n, t in base.items()}
    merged = merganser.merge(base, {"half": half, "double": double}, "average")
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        mean = (half[name].double() + double[name]) / 2
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64])
def test_dtypes_that_cannot_be_merged(dtype):
    base = tensors()
    with pytest.raises(WeightsError, match=r"^the base has tensors of dtype \S+, which cannot be merged: 'norm.bias'$"):
        check_match({**base, "norm.bias": base["norm.bias"].to(dtype)}, {"x": base})


def test_integers_are_the_bases_whatever_the_experts_have():
    base = {**tensors(), "position_ids": torch.arange(8)[None], "bn.num_batches_tracked": torch.tensor(3)}
    experts = {
        "older": tensors(1),
        "longer": {**tensors(2), "position_ids": torch.arange(16)[None], "mask": torch.ones(2, 2, dtype=torch.bool)},
    }
    found = match(base, experts)
    assert found.names == list(base)
    assert torch.equal(found.experts["older"]["position_ids"], base["position_ids"])
    merged = merganser.merge(base, experts, "average")
    assert set(merged) == set(base)
    assert torch.equal(merged["position_ids"], base["position_ids"])
    assert merged["bn.num_batches_tracked"] == 3
    assert check_match(tensors(), {"x": base}) == list(tensors())


def test_a_quantised_model_is_refused():
    base = tensors(0, a=(64, 64), norm=(64,))
    packed = {"a": torch.zeros(64, 64, dtype=torch.int32), "norm": base["norm"]}
    with pytest.raises(WeightsError, match=r"expert 'x' stores most of its weights as integers \(quantised\)"):
        check_match(base, {"x": packed})


def test_batch_norm_of_older_torch_has_no_counter():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    older = {n: t for n, t in net.items() if "num_batches" not in n}
    assert match(net, {"x": older}).names == list(net)
    assert match(older, {"x": net}).names == list(older)
    assert set(merganser.merge(net, [older, older], "average")) == set(net)


# stored deltas


@pytest.mark.parametrize("sharded", [False, True])
def test_a_stored_delta_is_an_expert(tmp_path, sharded):
    base = {**tensors(), "half": torch.randn(5).bfloat16(), "ids": torch.arange(4)}
    delta = {"body.weight": torch.randn(4, 4) * 1e-4, "half": torch.full((5,), 1e-4), "ids": torch.zeros(4).long()}
    kept = {"merganser.kind": "delta", "format": "pt"}
    if sharded:
        for k, name in enumerate(delta):
            save_file({name: delta[name]}, tmp_path / f"model-0000{k + 1}-of-00003.safetensors", metadata=kept)
        weight_map = {n: f"model-0000{k + 1}-of-00003.safetensors" for k, n in enumerate(delta)}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    else:
        save_file(delta, tmp_path / "model.safetensors", metadata=kept)
    found = match(base, {"x": open_weights(tmp_path)}).experts["x"]
    assert set(found) == set(base)
    assert torch.equal(found["body.weight"], base["body.weight"] + delta["body.weight"])
    assert torch.equal(found["half"], base["half"].float() + 1e-4)
    assert header(found, "half") == ("F32", (5,))
    assert torch.equal(found["ids"], base["ids"])
    assert torch.equal(found["norm.bias"], base["norm.bias"])
    assert header(found, "norm.bias") == ("F32", (4,))
    with pytest.raises(WeightsError, match=r"a delta of another base: its tensor 'body.weight'"):
        over({n: t for n, t in base.items() if n != "body.weight"}, open_weights(tmp_path))
    assert over(base, base) is base


def test_what_a_merge_stores_as_a_delta_is_read_as_an_expert(tmp_path):
    base = {n: t.bfloat16() for n, t in tensors().items()}
    expert = {n: t + 1e-3 for n, t in tensors().items()}
    merganser.save(base, tmp_path / "base")
    merganser.merge(tmp_path / "base", [expert], "average", into=tmp_path / "delta", stored="delta")
    again = merganser.merge(tmp_path / "base", [tmp_path / "delta"], "average", dtype="float32")
    for name, tensor in merganser.merge(tmp_path / "base", [expert], "average", dtype="float32").items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-7)


def test_a_view_holds_nothing_and_knows_its_headers():
    weights = tensors()
    view = Picked({"a": (weights, "body.weight"), "b": (weights, "norm.bias")})
    assert list(view) == ["a", "b"]
    assert len(view) == 2
    assert "body.weight" not in view
    assert view["a"] is weights["body.weight"]
    assert header(view, "b") == ("F32", (4,))
