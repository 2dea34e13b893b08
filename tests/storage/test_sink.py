"""Writing a model: in pieces, by threads, all or nothing, one writer at a time, going on where a killed one was."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from readers import INDEX, SINGLE, as_transformers, model, same, which, write_as_others_do
from safetensors import safe_open
from safetensors.torch import load_file

import merganser
from merganser.errors import WeightsError
from merganser.weights import settle as settling
from merganser.weights.save import carry
from merganser.weights.settle import CARDS, NEW, PARTIAL, TAGS
from merganser.weights.sink import DTYPES, PROGRESS, Sink, nbytes, spec_of
from merganser.weights.stored import Stored


def fill(sink, weights):
    for name in sink.missing.copy():
        sink.put(name, weights[name])
    return sink.close()


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_pieces_from_many_threads_are_the_bytes_of_whole_tensors(tmp_path):
    told = {f"t{k}": torch.randn(1000 + 37 * k).to(dtype) for k, dtype in enumerate(DTYPES) if dtype.is_floating_point}
    merganser.save(told, tmp_path / "whole")
    sink = Sink(tmp_path / "pieces", spec_of(told), shard_size=9000)
    pieces = [(name, at) for name, t in told.items() for at in range(0, len(t), 101)]
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0)).tolist()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: sink.put(pieces[k][0], told[pieces[k][0]][pieces[k][1] :][:101], pieces[k][1]), order))
    assert sink.missing == set(told), "a tensor in pieces is complete when that is said"
    for name in told:
        sink.done(name)
    pieced = sink.close()
    assert len(pieced.shards) == 3
    for name in told:
        assert torch.equal(pieced.flat(name).view(torch.uint8), told[name].view(torch.uint8))
        assert torch.equal(Stored(tmp_path / "whole").flat(name).view(torch.uint8), told[name].view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_back_by_us_and_by_safetensors(tmp_path, dtype):
    bits = torch.arange(48, dtype=torch.uint8)
    told = {"x": (bits % 2).bool() if dtype is torch.bool else bits.view(dtype).reshape(2, -1)}
    told["none"], told["one"] = told["x"].reshape(-1)[:0].reshape(0, 3), told["x"].reshape(-1)[1].clone()
    merganser.save(told, tmp_path)
    stored = Stored(tmp_path)
    for name, tensor in told.items():
        assert stored[name].shape == tensor.shape
        assert stored[name].dtype == dtype
        assert torch.equal(stored.flat(name).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    if DTYPES[dtype] != "F8_E8M0":  # safetensors 0.8 writes it and does not read it
        assert torch.equal(load_file(tmp_path / SINGLE)["x"].view(torch.uint8), told["x"].view(torch.uint8))


def test_tensors_of_any_memory_layout_are_written(tmp_path):
    x = torch.randn(4, 6)
    told = {
        "transposed": x.T,
        "strided": x[:, ::2],
        "expanded": x[:1].expand(5, 6),
        "grad": torch.nn.Parameter(x),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(3, 0, 2),
    }
    merganser.save(told, tmp_path)
    assert same(Stored(tmp_path), {n: t.detach().resolve_conj() for n, t in told.items()})


def test_what_does_not_fit_the_announcement_is_refused(tmp_path):
    sink = Sink(tmp_path, {"a": ("F16", (4,))})
    for match, args in (
        ("'b' was not announced", ("b", torch.zeros(4))),
        ("'a' is torch.bfloat16 where torch.float16 was announced", ("a", torch.zeros(4, dtype=torch.bfloat16))),
        ("bytes 0 to 10; 8 were announced", ("a", torch.zeros(5).half())),
        ("bytes 4 to 12; 8 were announced", ("a", torch.zeros(4).half(), 2)),
        ("bytes -2 to", ("a", torch.zeros(1).half(), -1)),
    ):
        with pytest.raises(WeightsError, match=match):
            sink.put(*args)
    with pytest.raises(WeightsError, match="1 tensors were never written, first a"):
        sink.close()
    sink.abandon()
    with pytest.raises(WeightsError, match=r"'a' is torch.complex128, which safetensors"):
        merganser.save({"a": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_shards_follow_the_conventions_of_the_hub(tmp_path):
    told = {f"layer.{k}": torch.full((100,), float(k)) for k in range(10)} | {"big": torch.zeros(1000)}
    sink = Sink(tmp_path, spec_of(told), metadata={"merganser.key": "k"}, shard_size=1500)
    fill(sink, told)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors" for k in range(len(shards))]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in told.values())
    assert index["weight_map"].keys() == told.keys()
    assert sorted(set(index["weight_map"].values())) == shards
    for shard in shards:
        with safe_open(tmp_path / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "merganser.key": "k"}
            held = sum(told[name].nbytes for name in file.keys())  # noqa: SIM118
            assert held <= 1500 or list(file.keys()) == ["big"]
    assert same(as_transformers(tmp_path), told)


def test_one_writer_at_a_time_here_and_in_another_process(tmp_path):
    told = model(1)
    sink = Sink(tmp_path / "out", spec_of(told))
    with pytest.raises(WeightsError, match=rf"out: another process \(pid {os.getpid()}\) is writing there"):
        Sink(tmp_path / "out", spec_of(told))
    code = (
        "import sys, torch, merganser\n"
        "from merganser.errors import WeightsError\n"
        "try: merganser.save({'a': torch.zeros(2)}, sys.argv[1])\n"
        "except WeightsError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, check=True, timeout=120
    )
    assert f"another process (pid {os.getpid()}) is writing there" in done.stdout
    fill(sink, told)
    assert same(merganser.save(model(2), tmp_path / "out"), model(2)), "the lock is gone with the sink"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [SINGLE]


def test_a_sink_that_is_dropped_lets_go_of_its_folder(tmp_path):
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir())) if opened.exists() else None
    sink = Sink(tmp_path, spec_of(model(1)), shard_size=200)
    del sink
    if before is not None:
        assert len(list(opened.iterdir())) == before
    assert same(merganser.save(model(2), tmp_path), model(2))


def test_abandoning_leaves_things_as_they_were(tmp_path):
    sink = Sink(tmp_path / "a" / "b", spec_of(model(1)))
    (sink.staging / "config.json").write_text("{}")
    sink.abandon()
    sink.abandon()
    assert list(tmp_path.iterdir()) == []
    merganser.save(model(1), tmp_path / "a", {"key": "1"})
    before = files(tmp_path)
    sink = Sink(tmp_path / "a", spec_of(model(2)))
    fill_but_one = sorted(sink.missing)[1:]
    for name in fill_but_one:
        sink.put(name, model(2)[name])
    sink.abandon()
    assert files(tmp_path) == before


# ---- going on


def half(folder, key, *, seed=1, metadata=None, leave=True):
    """Write three of six tensors, and go as a killed process does, or by `leave`."""
    told = model(seed)
    sink = Sink(folder, spec_of(told), key=key, shard_size=300, metadata=metadata)
    sink.every = 10.0 if leave else 0.0
    for name in "abc":
        if name in sink.missing:
            sink.put(name, told[name])
    (sink.staging / "card.json").write_text("{}")
    if leave:
        sink.leave()
    return told


@pytest.mark.parametrize("leave", [True, False])
def test_the_same_key_goes_on_where_the_other_was(tmp_path, leave):
    told = half(tmp_path / "out", "k", leave=leave)
    sink = Sink(tmp_path / "out", spec_of(told), key="k", shard_size=300)
    assert sink.missing == set("def")
    assert not (sink.staging / "card.json").exists(), "what stands beside the weights is written anew"
    fill(sink, told)
    Sink(tmp_path / "other", spec_of(told), shard_size=300).abandon()
    fill(Sink(tmp_path / "other", spec_of(told), shard_size=300), told)
    assert files(tmp_path / "out") == files(tmp_path / "other")


@pytest.mark.parametrize(
    "other",
    [{"key": "j"}, {"key": None}, {"metadata": {"a": "b"}}, {"shard_size": 10**9}, {"spec": {"a": ("F32", (3,))}}],
)
def test_another_job_starts_from_the_beginning(tmp_path, other):
    told = half(tmp_path, "k")
    given = {"spec": spec_of(told), "key": "k", "shard_size": 300, **other}
    sink = Sink(tmp_path, **given)
    assert sink.missing == set(given["spec"])
    del sink  # killed as well, before it had anything: what it left must not be taken for the first one's work
    sink = Sink(tmp_path, spec_of(told), key="k", shard_size=300)
    assert sink.missing == set(told)
    assert same(fill(sink, told), told)


def test_a_short_job_keeps_no_journal(tmp_path):
    told = model(1)
    sink = Sink(tmp_path, spec_of(told), key="k")
    for name in told:
        sink.put(name, told[name])
    assert not (tmp_path / PARTIAL / PROGRESS).exists()
    assert same(sink.close(), told)


@pytest.mark.parametrize("broken", ["", "[]", "{}", '{"key": "k"}', '{"key": "k", "done": ["zz"]}'])
def test_a_broken_journal_is_no_reason_to_stop(tmp_path, broken):
    told = half(tmp_path, "k")
    (tmp_path / PARTIAL / PROGRESS).write_text(broken)
    sink = Sink(tmp_path, spec_of(told), key="k", shard_size=300)
    assert sink.missing == set(told)
    assert same(fill(sink, told), told)


# ---- the old model and the new one


def test_cards_and_configs_come_with_the_weights_they_tell_of(tmp_path):
    def made(key, *names):
        sink = Sink(tmp_path, spec_of(model(1)))
        for name in names:
            (sink.staging / name).parent.mkdir(exist_ok=True)
            (sink.staging / name).write_text(f"---\n{TAGS}\nmerganser {key}")
        fill(sink, model(1))

    made("1", "config.json", "card.json", "README.md", "1_Pooling/config.json")
    assert files(tmp_path).keys() == {SINGLE, "config.json", "card.json", "README.md", "1_Pooling/config.json"}
    assert all(content.endswith(b"merganser 1") for name, content in files(tmp_path).items() if name != SINGLE)
    made("2", "config.json")
    assert files(tmp_path)["config.json"].endswith(b"merganser 2")
    assert not files(tmp_path).keys() & set(CARDS), "a card of the old weights would be wrong beside the new"
    (tmp_path / "README.md").write_text("# Notes of mine on merganser")
    made("3")
    assert (tmp_path / "README.md").read_text() == "# Notes of mine on merganser"


def test_what_is_carried_over_from_the_base(tmp_path):
    kept = ("config.json", "tokenizer.json", "1_Pooling/config.json", "additional_chat_templates/tool.jinja")
    left = ("model.safetensors", "pytorch_model.bin", "README.md", "card.json", ".git/config", ".cache/x.json")
    left += ("onnx/model.json", "openvino/model.xml", "checkpoint-500/config.json", "optimizer.pt")
    for name in kept + left:
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    (tmp_path / "base" / "dangling.json").symlink_to(tmp_path / "nowhere")
    assert sorted(carry(tmp_path / "base", tmp_path / "out")) == sorted(kept)
    assert files(tmp_path / "out") == {name: name.encode() for name in kept}


def test_files_of_others_stay(tmp_path):
    write_as_others_do(tmp_path, model(1), 3)
    mine = (
        "pytorch_model.bin",
        "adapter_model.safetensors",
        "model.fp16.safetensors",
        "notes.txt",
        "sub/model.safetensors",
    )
    for name in mine:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    merganser.save(model(2), tmp_path)
    assert files(tmp_path).keys() == {SINGLE, *mine}
    assert all((tmp_path / name).read_bytes() == b"mine" for name in mine)


def test_a_model_can_replace_the_one_it_is_read_from(tmp_path):
    merganser.save(model(1), tmp_path)
    stored = Stored(tmp_path)
    kept = stored["a"]
    assert same(merganser.save({**stored, "z": torch.ones(3)}, tmp_path), {**model(1), "z": torch.ones(3)})
    assert torch.equal(kept, model(1)["a"])


class Crash(BaseException):
    """What a kill is to the files: nothing is done any more."""


def dies_after(monkeypatch, calls):
    """Make the process die in the place of the call after ``calls`` renames and removals."""
    left = [calls]

    def counted(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Crash
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in ("replace", "unlink", "rename", "rmdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("config", ["same", "other", "first"])
@pytest.mark.parametrize(("old", "new"), [(0, 1), (0, 2), (1, 1), (1, 3), (3, 1), (2, 3), (3, 3)])
def test_no_crash_while_replacing_shows_a_mixture(tmp_path, old, new, config):
    was, will = model(1), model(2)
    if old:
        write_as_others_do(tmp_path / "start", was, old)
        (tmp_path / "start" / "card.json").write_text('{"key": "old"}')
    (tmp_path / "start").mkdir(exist_ok=True)
    if config != "first":
        (tmp_path / "start" / "config.json").write_text('{"width": 1}')
    seen, calls = [], 0
    while True:
        folder = tmp_path / f"dies{calls}"
        shutil.copytree(tmp_path / "start", folder)
        sink = Sink(folder, spec_of(will), shard_size=10**9 if new == 1 else 140 * -(-6 // new))
        for name, tensor in will.items():
            sink.put(name, tensor)
        (sink.staging / "config.json").write_text('{"width": 1}' if config == "same" else '{"width": 2}')
        (sink.staging / "card.json").write_text('{"key": "new"}')
        with pytest.MonkeyPatch.context() as patch:
            dies_after(patch, calls)
            try:
                sink.close()
                died = False
            except Crash:
                died = True
        del sink
        transformers = which(as_transformers(folder), old=was, new=will)
        mergekit = which(as_transformers(folder, index_first=True), old=was, new=will)
        assert {transformers, mergekit} <= {"old", "new", "none"}, f"{calls} calls"
        card = json.loads((folder / "card.json").read_text())["key"] if (folder / "card.json").exists() else None
        assert card in (None, transformers), "a card stands beside other weights"
        if config == "other" and transformers != "none":
            wide = (folder / "config.json").read_text()
            assert wide == ('{"width": 1}' if transformers == "old" else '{"width": 2}'), "another model's config"
        seen.append(transformers)
        committed = (folder / PARTIAL / "commit.json").exists()
        after = which(Stored(folder), old=was, new=will) if old or committed or not died else "old"
        assert after == ("old" if not committed and transformers == "old" else "new") or (not old and not committed)
        assert same(merganser.save(will, folder), will)
        assert not (folder / PARTIAL).exists()
        assert as_transformers(folder) is not None
        if not died:
            break
        calls += 1
    order = [("none" if not old else "old"), "none", "new"]
    assert all(order.index(a) <= order.index(b) for a, b in pairwise(seen)), "there and back again"
    assert seen[-1] == "new"
    gap = old and "none" in seen
    assert bool(gap) == (bool(old) and ((old == new == 3) or config == "other")), "the old model need not go first"


def test_a_crash_in_the_middle_of_settling_is_settled_as_well(tmp_path):
    was, will = model(1), model(2)
    write_as_others_do(tmp_path / "start", was, 3)
    sink = Sink(tmp_path / "start", spec_of(will), shard_size=280)
    for name, tensor in will.items():
        sink.put(name, tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settling, "finish", lambda folder: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            sink.close()
    del sink
    assert same(as_transformers(tmp_path / "start"), was)
    assert (tmp_path / "start" / PARTIAL / NEW / INDEX).exists()
    for first, second in ((0, 3), (2, 0), (4, 2), (5, 5), (7, 1), (9, 2), (11, 4)):
        folder = tmp_path / f"dies{first}-{second}"
        shutil.copytree(tmp_path / "start", folder)
        for calls in (first, second):
            with pytest.MonkeyPatch.context() as patch:
                dies_after(patch, calls)
                with contextlib.suppress(Crash):
                    Stored(folder)
            assert which(as_transformers(folder), old=was, new=will) != "a mixture"
        assert same(Stored(folder), will)
        assert same(as_transformers(folder), will)


def test_size_of_a_tensor():
    assert [nbytes(*told) for told in (("F32", ()), ("BF16", (3, 5)), ("C64", (2, 0)), ("F8_E4M3", (7,)))] == [
        4,
        30,
        0,
        7,
    ]
