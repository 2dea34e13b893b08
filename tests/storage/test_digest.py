"""The digest of weights: the same wherever the bytes lie and however they are cut, another at any change."""

import hashlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import merganser
from merganser.card import combine, digest, hash_piece
from merganser.weights.sink import DTYPES
from merganser.weights.stored import Stored

CUT = 65_536


def tensor(count, dtype, seed=0):
    bits = torch.randint(
        0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    return bits.view(dtype)


def as_written_down(weights):
    """Return the digest in plain integers, as its docstring says it."""
    stream = hashlib.shake_256(b"merganser fingerprint 1").digest(CUT)
    factors = [int.from_bytes(stream[k : k + 8], "little") | 1 for k in range(0, CUT, 8)]
    lines = ""
    for name, told in sorted(weights.items()):
        raw = bytes(told.reshape(-1).view(torch.uint8).tolist())
        sums = b""
        for at in range(0, len(raw), CUT):
            block = raw[at : at + CUT]
            words = [int.from_bytes(block[k : k + 8], "little") for k in range(0, len(block), 8)]
            for shift in (0, 32):
                total = sum(w * (x >> shift) for w, x in zip(factors, words, strict=False)) % 2**64
                sums += total.to_bytes(8, "little")
        dtype = str(told.dtype).removeprefix("torch.")
        lines += json.dumps([name, dtype, list(told.shape), hashlib.sha256(sums).hexdigest()]) + "\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def test_the_digest_is_what_is_written_down():
    """If this changes, every card written before tells of inputs that are not recognised any more."""
    told = {"b": torch.arange(70_000, dtype=torch.float32).reshape(2, -1), "a": torch.ones(3, dtype=torch.bfloat16)}
    told |= {"scalar": torch.tensor(7), "empty": torch.empty(0, 4)}
    assert digest(told) == as_written_down(told)
    assert digest(told) == "f94d02c35f69f95ec3b6e6f60fef5a127b26912eaf359194a032a51e8c77129d"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("count", [0, 1, CUT - 1, CUT, 3 * CUT + 5])
def test_pieces_join_to_the_hash_of_the_whole(dtype, count):
    x = tensor(count, dtype)
    for step in (CUT, 2 * CUT):
        assert b"".join(hash_piece(x[at : at + step]) for at in range(0, count, step)) == hash_piece(x)
    assert len(hash_piece(x)) == 16 * -(-x.nbytes // CUT)
    assert combine({"x": (dtype, (count,), hash_piece(x))}) == digest({"x": x})


def test_on_disk_as_in_memory_in_any_order(tmp_path):
    told = {str(dtype): tensor(1000, dtype) for dtype in DTYPES if dtype is not torch.bool}
    merganser.save(told, tmp_path)
    assert digest(Stored(tmp_path)) == digest(told) == digest(dict(reversed(told.items())))
    assert digest({n: t.reshape(10, -1).T.contiguous().T.reshape(-1) for n, t in told.items()}) == digest(told)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8 * 50_000 - 1), st.integers(1, 255), st.sampled_from([torch.uint8, torch.int64]))
def test_a_changed_byte_changes_it(at, by, dtype):
    x = torch.zeros(400_000, dtype=torch.uint8)
    y = x.clone()
    y[at] ^= by
    assert digest({"x": x.view(dtype)}) != digest({"x": y.view(dtype)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_changes_that_add_up_to_nothing_in_a_plain_sum(dtype):
    x = tensor(2 * CUT, torch.uint8).view(torch.int16).abs().float().to(dtype) + 1
    seen = {digest({"x": x})}

    def changed(y):
        before = len(seen)
        seen.add(digest({"x": y.to(dtype)}))
        assert len(seen) > before

    for a, b in ((0, 1), (1, 3), (3, 7), (1, 1023), (4, 8), (7, 15)):
        for sign in (1.0, -1.0):
            y = x.clone()
            y[a], y[b] = sign * x[b], sign * x[a]
            if not torch.equal(x, y):
                changed(y)
        y = x.clone()
        y[[a, b]] *= -1
        changed(y)
    changed(-x)
    changed(x.flip(0))
    changed(x.roll(1))
    changed(x.reshape(64, -1)[torch.arange(63, -1, -1)].reshape(-1))
    changed(torch.cat([x[CUT // 2 :], x[: CUT // 2]]))
    y = x.clone()
    y[7::8] *= -1
    changed(y)


def test_names_dtypes_and_shapes_count():
    x = torch.zeros(8, dtype=torch.int32)
    told = [
        {"x": x},
        {"y": x},
        {"x": x.float()},
        {"x": x.reshape(2, 4)},
        {"x": x.view(torch.int16)},
        {"x": x, "z": x[:0]},
    ]
    told += [{"x": torch.zeros(9, dtype=torch.int32)}, {"x": x, "z": x.reshape(8, 1)[:, :0]}]
    assert len({digest(weights) for weights in told}) == len(told)
