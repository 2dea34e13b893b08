"""Checkpoints on disk: what is written is what is read, half-written models do not exist, every fault has its line."""

import json
import pickle
import struct
from itertools import pairwise
from pathlib import Path

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
        assert file.metadata()["merganser.kind"] == "test"
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
            Stored(path)

    says("no such file or folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    says("no safetensors file in this folder", tmp_path / "empty")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    says(r"only a pickle \(pytorch_model.bin\) here; .* open_weights reads it", tmp_path / "empty")
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


def header(told, data=b"\0" * 64, length=None):
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(16,), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


TWO = {"a": entry(shape=(8,), offsets=(0, 32)), "b": entry(shape=(8,), offsets=(32, 64))}


@pytest.mark.parametrize(
    ("match", "content"),
    [
        ("the file is empty", b""),
        ("not a safetensors file", b"\0\0\0"),
        ("not a safetensors file", header(b"[1, 2]")),
        ("not a safetensors file", header({"a": entry()}, length=2**63)),
        ("not a safetensors file", header({"a": entry()}, length=100_000_001)),
        ("the file is cut short", header({"a": entry()}, length=1000)),
        ("not a safetensors file, or a corrupt one", header(b'{"a": ')),
        ("not a safetensors file, or a corrupt one", header(b'{"a": "\xff"}')),
        ("not a safetensors file, or a corrupt one", header(b'{"a":' * 50_000)),
        ("not a safetensors file, or a corrupt one", header({"a": [1]})),
        ("not a safetensors file, or a corrupt one", header({"a": {"dtype": "F32", "shape": [16]}})),
        ("not a safetensors file, or a corrupt one", header({"a": entry(), "__metadata__": 3})),
        ("metadata other than text", header({"a": entry(), "__metadata__": {"k": 3}})),
        ("'a' is there twice", header(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2))),
        ("'a' has dtype F4, which is none of BOOL, U8", header({"a": entry("F4", (128,))})),
        ("'a' has shape .-16. and bytes", header({"a": entry(shape=(-16,))})),
        ("'a' has shape .16.0. and bytes", header({"a": entry(shape=(16.0,))})),
        ("'a' has shape .16. and bytes 64 to 0", header({"a": entry(offsets=(64, 0))})),
        ("'a' has shape .16. and bytes -64 to 0", header({"a": entry(offsets=(-64, 0))})),
        ("'a' has 64 bytes where F32 .15. has 60", header({"a": entry(shape=(15,))})),
        ("'a' has 64 bytes where BF16 .16. has 32", header({"a": entry("BF16")})),
        ("'b' overlaps another", header({**TWO, "b": entry(shape=(8,), offsets=(28, 60))}, b"\0" * 60)),
        ("'b' comes after a hole", header({**TWO, "b": entry(shape=(8,), offsets=(36, 68))}, b"\0" * 68)),
        ("the file is cut short", header(TWO, b"\0" * 63)),
        ("1 bytes after the last tensor", header(TWO, b"\0" * 65)),
    ],
)
def test_a_corrupt_shard_is_named_with_what_is_wrong(tmp_path, match, content):
    shard = tmp_path / "model-00001-of-00001.safetensors"
    shard.write_bytes(content)
    with pytest.raises(WeightsError, match=match) as error:
        Stored(tmp_path)
    assert str(error.value).startswith(str(shard))
    assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40), st.integers(0, 300), st.booleans())
def test_damage_anywhere_is_an_error_of_ours_or_harmless(tmp_path_factory, damage, at, cut):
    shard = tmp_path_factory.mktemp("damage") / "model.safetensors"
    save_file({"a": torch.arange(8.0), "b": torch.ones(2, 3)}, shard, {"format": "pt"})
    raw = shard.read_bytes()
    shard.write_bytes(raw[:at] + damage + (b"" if cut else raw[at + len(damage) :]))
    told = ""
    try:
        for tensor in Stored(shard).values():
            tensor.sum()
    except WeightsError as error:
        told = str(error)
    assert not told or str(shard) in told


def sharded(folder):
    told = {name: torch.full((3,), float(k)) for k, name in enumerate("abcd")}
    sink = Sink(folder, spec_of(told), shard_size=24)
    for name, tensor in told.items():
        sink.put(name, tensor)
    return sink.close()


def test_an_index_that_contradicts_its_shards(tmp_path):
    sharded(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())

    def says(match, weight_map):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(WeightsError, match=match):
            Stored(tmp_path)

    first, second = sorted(set(index["weight_map"].values()))
    says(rf"index.json: says that {second} holds 'z'", {**index["weight_map"], "z": second})
    says(rf"says that {second} holds 'a'", {**index["weight_map"], "a": second})
    says(rf"{first}: holds 'b', which .* does not list", {n: f for n, f in index["weight_map"].items() if n != "b"})
    says("which is not a file beside it", {**index["weight_map"], "a": "../elsewhere.safetensors"})
    says("which is not a file beside it", {**index["weight_map"], "a": 3})
    says("not a shard index", ["a"])
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(WeightsError, match="not a shard index"):
        Stored(tmp_path)


def test_a_file_that_changes_under_us_is_told_and_ends_nothing(tmp_path):
    told = {"a": torch.arange(4096.0), "b": torch.ones(4096)}
    merganser.save(told, tmp_path)
    shard = tmp_path / "model.safetensors"
    raw = shard.read_bytes()
    opened = Stored(tmp_path)
    assert torch.equal(opened["a"], told["a"])
    shard.write_bytes(raw[:-4096])
    with pytest.raises(WeightsError, match="cut short while it was being read"):
        opened["b"]
    assert torch.equal(opened["a"][:8], told["a"][:8])
    shard.write_bytes(raw)
    untouched = Stored(tmp_path)
    merganser.save({"b": torch.zeros(4096), "a": torch.zeros(4096)}, tmp_path)
    with pytest.raises(WeightsError, match="was changed after it was opened"):
        untouched["a"]
    assert torch.equal(opened["b"], told["b"]), "a file that was replaced lives on for who has it open"
    gone = Stored(tmp_path)
    shard.unlink()
    with pytest.raises(WeightsError, match=r"model.safetensors: cannot be read: No such file"):
        gone["a"]


def test_flat_is_a_view_of_the_file_and_writing_into_it_stays_here(tmp_path):
    told = weights()
    merganser.save(told, tmp_path)
    stored = Stored(tmp_path)
    for name, tensor in told.items():
        assert stored.flat(name).shape == (tensor.numel(),)
        assert torch.equal(stored.flat(name), tensor.reshape(-1))
        assert tensor.numel() == 0 or stored.flat(name).data_ptr() == stored.flat(name).data_ptr(), "no copy"
    stored["layer.0.3"].add_(1)
    assert torch.equal(Stored(tmp_path)["layer.0.3"], told["layer.0.3"])
    with pytest.raises(KeyError):
        stored["layer.9.9"]


def test_a_file_whose_tensors_are_not_aligned(tmp_path):
    values = torch.arange(16.0)
    raw = header({"a": entry(), "__metadata__": {"pad": ""}}, values.numpy().tobytes())
    for pad in range(4):
        (tmp_path / "x.safetensors").write_bytes(raw)
        assert torch.equal(Stored(tmp_path)["a"], values)
        told = {"a": entry(), "__metadata__": {"pad": "." * (pad + 1)}}
        raw = header(told, values.numpy().tobytes())


def test_more_shards_than_a_process_may_have_open_at_first(tmp_path):
    import resource

    told = {f"t{k}": torch.full((2,), float(k)) for k in range(60)}
    sink = Sink(tmp_path, spec_of(told), shard_size=8)
    for name, tensor in told.items():
        sink.put(name, tensor)
    stored = sink.close()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 30
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, before[1]))
        assert all(torch.equal(stored[name], tensor) for name, tensor in told.items())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_stored_model_goes_to_another_process(tmp_path):
    stored = sharded(tmp_path)
    stored["a"]
    assert torch.equal(pickle.loads(pickle.dumps(stored))["c"], stored["c"])


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
