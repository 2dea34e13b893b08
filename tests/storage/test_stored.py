"""Checkpoints on disk: what is written is what is read, half-written models do not exist, every fault has its line."""

import json
import struct
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import merganser
from merganser.card import digest, read_card
from merganser.errors import WeightsError
from merganser.weights.open import check_match, named, open_weights
from merganser.weights.sink import DTYPES, Sink, spec_of
from merganser.weights.stored import INDEX, Stored

SHAPES = [(), (1,), (3,), (2, 5), (2, 3, 1, 2), (0, 4)]


def weights(seed=0, dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)):
    rng = torch.Generator().manual_seed(seed)
    return {
        f"layer.{d}.{k}": (torch.randn(shape, generator=rng) * 3).to(dtype)
        for d, dtype in enumerate(dtypes)
        for k, shape in enumerate(SHAPES)
    }


@settings(max_examples=25, deadline=None)
@given(st.permutations(sorted(weights())), st.sampled_from([50, 200, 10**9]))
def test_written_in_any_order_and_any_shards_reads_back_bit_equal(tmp_path_factory, order, shard_size):
    folder = tmp_path_factory.mktemp("sink")
    told = weights()
    sink = Sink(folder, spec_of(told), shard_size=shard_size)
    for name in order:
        sink.put(name, told[name])
    stored = sink.close()
    assert set(stored) == set(told)
    for name, tensor in told.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)
    assert digest(stored) == digest(told)


def test_other_libraries_read_what_we_write_and_we_what_they_write(tmp_path):
    told = weights()
    merganser.save(told, tmp_path / "ours", {"kind": "test", "key": "k"})
    theirs = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(theirs[n], told[n]) for n in told)
    with safe_open(tmp_path / "ours" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["merganser.key"] == "k"
    save_file(told, tmp_path / "one.safetensors")
    assert digest(Stored(tmp_path / "one.safetensors")) == digest(told)
    assert read_card(tmp_path / "ours")["versions"]["torch"]


def test_a_smaller_model_leaves_no_shard_of_the_larger_one_behind(tmp_path):
    sink = Sink(tmp_path, spec_of(weights()), shard_size=40)
    for name, tensor in weights().items():
        sink.put(name, tensor)
    sink.close()
    assert (tmp_path / INDEX).exists()
    merganser.save({"only": torch.ones(2)}, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors"]
    assert set(open_weights(tmp_path)) == {"only"}


def test_a_model_half_written_does_not_touch_the_earlier_one(tmp_path):
    merganser.save({"a": torch.ones(2)}, tmp_path)
    sink = Sink(tmp_path, {"a": ("F32", (2,)), "b": ("F32", (2,))})
    sink.put("a", torch.zeros(2))
    with pytest.raises(WeightsError, match="1 tensors were never written, first b"):
        sink.close()
    assert torch.equal(open_weights(tmp_path)["a"], torch.ones(2))
    sink.abandon()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_faults_are_named(tmp_path):
    def says(match, path):
        with pytest.raises(WeightsError, match=match):
            open_weights(path)

    says("no such file or folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    says("no safetensors file in this folder", tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    says(r"only a pickle \(pytorch_model.bin\).*weights_only=True", tmp_path / "empty")
    says("a pickle can run code", tmp_path / "empty" / "pytorch_model.bin")
    text = tmp_path / "text.safetensors"
    text.write_text("hello world, not a header")
    says("not a safetensors file", text)
    merganser.save({"a": torch.ones(100)}, tmp_path / "cut")
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-8])
    says("cut short", tmp_path / "cut")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    says("which is missing", tmp_path / "shards")


def test_two_models_in_one_folder_are_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(WeightsError, match="'a' is in two shards"):
        open_weights(tmp_path)


def test_the_header_is_aligned_and_complete(tmp_path):
    merganser.save(weights(), tmp_path)
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    at = sorted(e["data_offsets"] for e in header.values())
    assert at[0][0] == 0
    assert at[-1][1] == len(raw) - 8 - length
    assert all(a[1] == b[0] for a, b in pairwise(at))
    assert {e["dtype"] for e in header.values()} <= set(DTYPES.values())


def test_mismatch_names_three_tensors_and_what_own_would_do():
    base = {f"body.{k}": torch.zeros(2) for k in range(6)}
    expert = {**base, **{f"head.{k}": torch.zeros(1) for k in range(5)}}
    with pytest.raises(WeightsError) as error:
        check_match(base, {"x": expert})
    text = str(error.value)
    assert "expert 'x' has, and the base lacks, 'head.0', 'head.1', 'head.2' and 2 more" in text
    assert 'own=["head.*"]' in text
    assert check_match(base, {"x": expert}, ["head.*"]) == list(base)
    with pytest.raises(WeightsError, match=r"expert 'y' lacks 'body.3'"):
        check_match(base, {"y": {n: t for n, t in base.items() if n != "body.3"}})
    with pytest.raises(WeightsError, match=r"'body.1' \[3\] instead of \[2\]"):
        check_match(base, {"z": {**base, "body.1": torch.zeros(3)}})


def test_names_of_experts():
    assert list(named(["a/sst2", "b/trec"])) == ["sst2", "trec"]
    assert len(named(["a/x", "b/x"])) == 2
    assert list(named([{}, {}])) == ["expert0", "expert1"]
