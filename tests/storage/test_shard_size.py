"""How large the files of a result may be, in a merge, in its parts and in what joins them."""

import json

import pytest
import torch
from safetensors.torch import load_file

import merganser
from merganser.card import read_card
from merganser.errors import SentenceError, WeightsError
from merganser.weights.parts import join
from merganser.weights.sink import shard_bytes

BASE = {f"layers.{k}.weight": torch.full((50, 50), float(k)) for k in range(6)}  # 10,000 bytes each
EXPERT = {name: tensor + 1 for name, tensor in BASE.items()}


@pytest.mark.parametrize(
    ("told", "size"),
    [(None, 5 * 10**9), (123, 123), ("123", 123), ("5GB", 5 * 10**9), ("5G", 5 * 10**9), ("1.5 mb", 1_500_000),
     ("2GiB", 2 << 30), ("10KB", 10_000), ("1TB", 10**12), ("7B", 7)],
)  # fmt: skip
def test_a_size_is_bytes_or_a_number_with_a_unit(told, size):
    assert shard_bytes(told) == size


@pytest.mark.parametrize("told", [0, -5, "0GB", "GB", "5XB", "5 G B", "five", "-5GB", True, 2.5, "1e9", ""])
def test_what_is_no_size_is_told(told):
    with pytest.raises(WeightsError, match="such as 5GB"):
        shard_bytes(told)


def shards(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_no_file_is_larger_and_all_is_there(tmp_path):
    merged = merganser.merge(BASE, [EXPERT], "average", into=tmp_path / "cut", shard_size="25kB")
    assert shards(tmp_path / "cut") == [f"model-{k:05d}-of-00003.safetensors" for k in (1, 2, 3)]
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())["weight_map"]
    for name in shards(tmp_path / "cut"):
        held = load_file(tmp_path / "cut" / name)
        assert sum(t.nbytes for t in held.values()) <= 25_000
        assert {n for n, where in index.items() if where == name} == held.keys()
    whole = merganser.merge(BASE, [EXPERT], "average", into=tmp_path / "whole")
    assert shards(tmp_path / "whole") == ["model.safetensors"]
    assert all(torch.equal(merged[n], whole[n]) for n in BASE)
    assert read_card(tmp_path / "cut")["shard_size"] == "25kB"
    assert "shard_size" not in read_card(tmp_path / "whole")


def test_parts_are_joined_into_such_files(tmp_path):
    merganser.merge(BASE, [EXPERT], "average", into=tmp_path / "one", shard_size="25kB")
    for k in (1, 2):
        merganser.merge(BASE, [EXPERT], "average", into=tmp_path / "two", shard_size="25kB", part=(k, 2))
    join(tmp_path / "two")
    assert shards(tmp_path / "two") == shards(tmp_path / "one")
    for name in (*shards(tmp_path / "one"), "model.safetensors.index.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_where_there_is_nothing_to_cut_it_is_refused(tmp_path):
    with pytest.raises(SentenceError, match="a shard size needs --to"):
        merganser.merge(BASE, [EXPERT], "average", shard_size="1GB")
    with pytest.raises(WeightsError, match="such as 5GB"):
        merganser.merge(BASE, [EXPERT], "average", into=tmp_path / "out", shard_size="much")
    assert not (tmp_path / "out").exists()
