"""What may go wrong while a model is written: after each fault the old output is whole or the new one is, and running
again gives the bytes it would have given."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from readers import as_transformers, model, same, which, write_as_others_do

import merganser
from merganser.card import read_card
from merganser.errors import WeightsError
from merganser.weights import sink as sinks
from merganser.weights.settle import COMMIT, NEW, PARTIAL
from merganser.weights.sink import Sink, spec_of
from merganser.weights.stored import Stored

OLD, WILL = "task_arithmetic | scale(by=0.5)", "task_arithmetic | scale(by=0.25)"
MERGE = """
import sys
from merganser.weights.sink import Sink
Sink.__init__.__kwdefaults__["shard_size"] = int(sys.argv[1])
Sink.every = 0.02
import merganser, torch
torch.set_num_threads(1)
print("ready", flush=True)
sys.stdin.readline()
try:
    merganser.merge(sys.argv[2] + "/base", [sys.argv[2] + "/a", sys.argv[2] + "/b"], sys.argv[3], into=sys.argv[4])
except merganser.errors.WeightsError as error:
    print(error, flush=True)
else:
    print("done", flush=True)
"""
KILLED = """
import os, sys
from merganser.weights.sink import Sink
Sink.__init__.__kwdefaults__["shard_size"] = int(sys.argv[1])
Sink.every = 0.02
import merganser, merganser.merge, torch
torch.set_num_threads(1)
print("ready", flush=True)
for _ in sys.stdin:
    child = os.fork()  # merges at once, without the seconds that an import takes
    if child == 0:
        merganser.merge(sys.argv[2] + "/base", [sys.argv[2] + "/a", sys.argv[2] + "/b"], sys.argv[3], into=sys.argv[4])
        os._exit(0)
    print(child, flush=True)
    sys.stdin.readline()  # until then it stays, ended or not, and its number is its own
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
EXITS = """
import os, shutil, sys
root, sentence, shard_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
from merganser.weights.sink import Sink
Sink.__init__.__kwdefaults__["shard_size"] = shard_size
Sink.every = 0.0
import merganser, merganser.merge, torch
torch.set_num_threads(1)
for calls in range(1000):
    folder = f"{root}/dies{calls}"
    shutil.copytree(f"{root}/start", folder)
    child = os.fork()
    if child == 0:
        left = [calls]
        def counted(function):
            def call(*args, **kwargs):
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return function(*args, **kwargs)
            return call
        for name in ("replace", "rename", "unlink", "rmdir", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        merganser.merge(f"{root}/base", [f"{root}/a", f"{root}/b"], sentence, into=folder)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(calls)
"""


def lay_out(root, tensors, width, shards=1):
    """Write a base and two experts, an old merge of them at ``out``, and what the old and the new merge hold."""
    for k, name in enumerate(("base", "a", "b")):
        rng = torch.Generator().manual_seed(k)
        told = {f"layer.{n:02d}.weight": torch.randn(width, 100, generator=rng) for n in range(tensors)}
        write_as_others_do(root / name, told, shards)
        (root / name / "config.json").write_text('{"width": 100}')
    sources = root / "base", [root / "a", root / "b"]
    return {"old": dict(merganser.merge(*sources, OLD)), "new": dict(merganser.merge(*sources, WILL))}


def merge_again(root, folder, shard_size, sentence=WILL):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Sink.__init__.__kwdefaults__, "shard_size", shard_size)
        return merganser.merge(root / "base", [root / "a", root / "b"], sentence, into=folder)


def weights_bytes(folder):
    return {p.name: p.read_bytes() for p in folder.glob("model*")}


def check_after_fault(root, folder, known, shard_size, wanted):
    """Check what a reader finds now, what we find, that cards tell of it, and that merging again gives the same."""
    found = {which(as_transformers(folder, index_first), **known) for index_first in (False, True)}
    assert "a mixture" not in found
    if not (folder / PARTIAL / COMMIT).exists():
        assert "none" not in found, "before the commit and after it there is a model"
    card = json.loads((folder / "card.json").read_text()) if (folder / "card.json").exists() else None
    assert card is None or found == {{OLD: "old", WILL: "new"}[card["sentence"]]}, "a card stands beside other weights"
    held = which(Stored(folder), **known)
    assert held in ("old", "new")
    assert {which(as_transformers(folder, index_first), **known) for index_first in (False, True)} == {held}
    card = read_card(folder)
    assert card is not None
    assert card["sentence"] == {"old": OLD, "new": WILL}[held]
    merge_again(root, folder, shard_size)
    assert weights_bytes(folder) == wanted
    assert not (folder / PARTIAL).exists()
    return held


def start(root, folder, shard_size, sentence=WILL, program=MERGE):
    command = [sys.executable, "-c", program, str(shard_size), str(root), sentence, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def kills(tmp_path, moments, shard_size, tensors=20, width=3000):
    """Kill (-9) a merge at each moment, a share of the time it takes; return what the folder held after each."""
    known = lay_out(tmp_path, tensors, width, shards=2)
    merge_again(tmp_path, tmp_path / "out", shard_size, OLD)
    old = tmp_path / "kept"
    shutil.copytree(tmp_path / "out", old)
    process = start(tmp_path, tmp_path / "out", shard_size, program=KILLED)

    def ends(after=None):
        go(process)
        child, began = int(process.stdout.readline()), time.monotonic()
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        go(process)
        return int(process.stdout.readline()), time.monotonic() - began

    status, took = ends()
    assert status == 0
    wanted = weights_bytes(tmp_path / "out")
    held, left = [], list(moments)
    for _ in range(3 * len(left)):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(old, tmp_path / "out")
        status, _ = ends(left[0] * took)
        held.append(check_after_fault(tmp_path, tmp_path / "out", known, shard_size, wanted))
        if status == -signal.SIGKILL:
            left.pop(0)
        else:
            took *= 0.8  # a machine that was busy is no longer: try that moment again
        if not left:
            break
    process.stdin.close()
    process.wait(timeout=60)
    assert not left, "every kill should come before the end"
    return held


@pytest.mark.parametrize("shard_size", [10**7, 10**10], ids=["shards", "one file"])
def test_killed_at_twenty_random_moments(tmp_path, shard_size):
    chance = random.Random(shard_size)
    moments = sorted(chance.uniform(0, 1) for _ in range(20))
    assert "old" in kills(tmp_path, moments, shard_size)


def killed(command, after):
    """Run a command and kill it (-9) after so many seconds; return how long it took, None where the kill came first."""
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    assert process.returncode == 0, said
    return time.monotonic() - began


@pytest.mark.slow
def test_parts_their_join_and_a_yaml_survive_kills(tmp_path):
    """By the command line, at random moments of each; done again, it is what one process writes that nobody killed."""
    lay_out(tmp_path, 40, 3000, shards=2)
    ours = [sys.executable, "-m", "merganser"]
    models = [str(tmp_path / name) for name in ("base", "a", "b")]
    (tmp_path / "all.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {models[0]}\ndtype: float32\nparameters: {{lambda: 0.25}}\nmodels:\n"
        + "".join(f"  - {{model: {model}, parameters: {{weight: 1.0}}}}\n" for model in models[1:])
    )
    parts = str(tmp_path / "parts")
    merge = [*ours, "merge", *models, "--how", "dare | ties"]
    works = [[*merge, "--to", parts, "--part", f"{k}/3"] for k in (3, 1, 2)]
    works += [[*ours, "join", parts], [*ours, "merge", str(tmp_path / "all.yml"), "--to", str(tmp_path / "yaml")]]
    works += [[*merge, "--to", str(tmp_path / "whole")]]
    chance = random.Random(0)
    for work in works:
        trial = tmp_path / "trial"
        if parts not in work:
            took = killed([str(trial) if part == work[work.index("--to") + 1] else part for part in work], 600)
            shutil.rmtree(trial)
        else:
            took = 1.0
        for _ in range(4):
            if killed(work, chance.uniform(0.2, 1) * took) is not None:
                break  # it was quicker, and is done
        else:
            assert killed(work, 600) is not None
    assert weights_bytes(tmp_path / "parts") == weights_bytes(tmp_path / "whole")
    assert not list((tmp_path / "parts").glob("part-*"))
    made = merganser.merge(models[0], models[1:], WILL)
    held = Stored(tmp_path / "yaml")
    assert all(torch.allclose(held[name], made[name], atol=1e-6) for name in made)


@pytest.mark.slow
@pytest.mark.parametrize("shard_size", [1000, 10**10])
def test_exits_at_every_rename_removal_and_sync(tmp_path, shard_size):
    known = lay_out(tmp_path, 4, 2)
    merge_again(tmp_path, tmp_path / "start", shard_size, OLD)
    merge_again(tmp_path, tmp_path / "whole", shard_size)
    wanted = weights_bytes(tmp_path / "whole")
    command = [sys.executable, "-c", EXITS, str(tmp_path), WILL, str(shard_size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    calls = int(done.stdout)
    assert calls >= 12
    held = [check_after_fault(tmp_path, tmp_path / f"dies{k}", known, shard_size, wanted) for k in range(calls + 1)]
    assert held == sorted(held, reverse=True), "old until the commit, new from then on"
    assert set(held) == {"old", "new"}


def test_two_processes_at_once(tmp_path):
    known = lay_out(tmp_path, 30, 3000)
    both = [start(tmp_path, tmp_path / "out", 10**10, sentence) for sentence in (OLD, WILL)]
    for process in both:
        go(process)
    said = [process.stdout.readline() for process in both]
    for process in both:
        assert process.wait(timeout=120) == 0
    assert "done\n" in said
    for line in said:
        assert line == "done\n" or f"{tmp_path / 'out'}: another process" in line
    held = which(Stored(tmp_path / "out"), **known)
    assert read_card(tmp_path / "out")["sentence"] == {"old": OLD, "new": WILL}[held]
    assert same(as_transformers(tmp_path / "out"), known[held])
    assert not (tmp_path / "out" / PARTIAL).exists()


def test_a_killed_process_lets_go_of_the_folder(tmp_path):
    code = (
        "import sys, time\n"
        "from merganser.weights.sink import Sink\n"
        "sink = Sink(sys.argv[1], {'a': ('F32', (2,))})\n"
        "print('has it', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "has it\n"
    with pytest.raises(WeightsError, match=rf"another process \(pid {holder.pid}\)"):
        merganser.save(model(1), tmp_path)
    holder.kill()
    holder.wait(timeout=60)
    assert same(merganser.save(model(1), tmp_path), model(1))


def test_a_damaged_input_leaves_the_output_alone(tmp_path):
    known = lay_out(tmp_path, 4, 10)
    merge_again(tmp_path, tmp_path / "out", 10**10, OLD)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    shard = tmp_path / "b" / "model.safetensors"
    raw = shard.read_bytes()
    for damaged in (raw[: len(raw) // 2], b"", b"\0" * len(raw), raw[:8] + b"[" + raw[9:]):
        shard.write_bytes(damaged)
        with pytest.raises(WeightsError, match=str(shard)):
            merge_again(tmp_path, tmp_path / "out", 10**10)
        assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    shard.write_bytes(raw)
    assert same(merge_again(tmp_path, tmp_path / "out", 10**10), known["new"])


# ---- disks


@pytest.fixture
def small_disk(tmp_path):
    """Yield a disk of 1 MB of our own."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"cannot mount a disk of its own here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill_up(disk, leave=0):
    with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    os.truncate(disk / "filler", max((disk / "filler").stat().st_size - leave, 0))


def large(seed):
    return {f"t{k}": torch.full((40_000,), float(seed + k)) for k in range(3)}  # 480 kB


def test_a_disk_too_small_is_told_before_the_work(small_disk):
    merganser.save(large(1), small_disk / "out")
    with pytest.raises(WeightsError, match=r"out: needs 720\.\d kB, and 5\d\d\.\d kB are free on this disk; make room"):
        Sink(small_disk / "out", {f"t{k}": ("F32", (60_000,)) for k in range(3)})
    assert same(Stored(small_disk / "out"), large(1))
    assert [p.name for p in (small_disk / "out").iterdir()] == ["model.safetensors"]
    with pytest.raises(WeightsError, match="needs 9"):
        merganser.save({"x": torch.zeros(240_000)}, small_disk / "new" / "one")
    assert not (small_disk / "new").exists()


def test_a_disk_that_fills_up_after_the_start_does_not_matter(small_disk):
    """The room was reserved, so others can have the rest."""
    sink = Sink(small_disk / "out", spec_of(large(2)))
    fill_up(small_disk, leave=40_000)
    for name, tensor in large(2).items():
        sink.put(name, tensor)
    assert same(sink.close(), large(2))


@pytest.mark.parametrize("when", ["in the middle", "at the cards", "at the end"])
def test_a_disk_full_in_spite_of_that(small_disk, monkeypatch, when):
    """Not every disk can reserve, and what is put beside the weights is not known before."""
    merganser.save(model(1), small_disk / "out", {"key": "1"})
    monkeypatch.setattr(sinks, "_reserve", lambda file, size: os.ftruncate(file, size))
    sink = Sink(small_disk / "out", spec_of(large(2)))
    sink.put("t0", large(2)["t0"])
    if when != "in the middle":
        sink.put("t1", large(2)["t1"])
        sink.put("t2", large(2)["t2"])
    fill_up(small_disk)

    def write_a_card():
        with sink.told():
            (sink.staging / "card.json").write_bytes(b" " * 100_000)

    steps = {"in the middle": lambda: sink.put("t1", large(2)["t1"]), "at the cards": write_a_card}
    with pytest.raises(WeightsError, match="out: cannot write: the disk is full; what was there before is as it was"):
        steps.get(when, sink.close)()
    sink.abandon()
    assert sorted(p.name for p in (small_disk / "out").iterdir()) == ["card.json", "model.safetensors"]
    assert same(Stored(small_disk / "out"), model(1))
    assert read_card(small_disk / "out")["key"] == "1"
    (small_disk / "filler").unlink()
    assert same(merganser.save(large(2), small_disk / "out"), large(2))


def test_the_command_line_says_it_in_one_line(small_disk, tmp_path):
    lay_out(tmp_path, 4, 1000)
    command = [sys.executable, "-m", "merganser.cli", "merge", *(str(tmp_path / name) for name in ("base", "a", "b"))]
    command += ["--how", "average", "--to", str(small_disk / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    said = " ".join((done.stdout + done.stderr).split())
    assert "needs 1.6 MB, and" in said
    assert "Traceback" not in said
    assert not (small_disk / "out").exists()


def test_a_limit_on_the_size_of_files(tmp_path):
    merganser.save(model(1), tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(WeightsError, match="the file would be larger than this disk or process may write"):
            merganser.save(large(2), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert same(Stored(tmp_path), model(1))
    assert same(merganser.save(large(2), tmp_path), large(2))


@contextlib.contextmanager
def read_only(place):
    """Make a folder read-only: as a disk where we are root, whom permissions do not stop."""
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        yield "it is on a read-only disk"
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    else:
        places = [place, *(p for p in place.rglob("*") if p.is_dir())]
        for folder in places:
            folder.chmod(0o555)
        yield "no permission to write there"
        for folder in places:
            folder.chmod(0o755)


@pytest.fixture
def disk(request, tmp_path):
    """Return a disk where we are root, else a plain folder."""
    return request.getfixturevalue("small_disk") if os.geteuid() == 0 else tmp_path


def test_a_read_only_target(disk):
    merganser.save(model(1), disk / "out")
    with read_only(disk) as reason:
        for folder in (disk / "out", disk / "new", disk / "new" / "er"):
            with pytest.raises(WeightsError, match=f"{folder}: cannot write: {reason}"):
                merganser.save(model(2), folder)
        assert same(Stored(disk / "out"), model(1))
    assert [p.name for p in (disk / "out").iterdir()] == ["model.safetensors"]
    assert same(merganser.save(model(2), disk / "out"), model(2))


def test_an_unfinished_commit_where_it_cannot_be_finished(disk, monkeypatch):
    merganser.save(model(1), disk / "out")
    with monkeypatch.context() as patch:
        patch.setattr("merganser.weights.settle.finish", lambda folder: sys.exit(9))
        with pytest.raises(SystemExit):
            merganser.save(model(2), disk / "out")
    assert (disk / "out" / PARTIAL / NEW / "model.safetensors").exists()
    with (
        read_only(disk) as reason,
        pytest.raises(WeightsError, match=f"cannot be brought to its end: {reason}; open it once where"),
    ):
        Stored(disk / "out")
    assert same(Stored(disk / "out"), model(2))


def test_places_that_are_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "away")
    for place in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "link"):
        with pytest.raises(WeightsError, match=f"{place}: cannot write: a file lies where a folder should be"):
            merganser.save(model(1), place)
    (tmp_path / "out" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(WeightsError, match=r"a folder lies where the file model.safetensors should be; remove it"):
        merganser.save(model(1), tmp_path / "out")
    assert (tmp_path / "file").read_text() == "mine"
    assert same(merganser.save(model(1), tmp_path / "a" / "b" / "c"), model(1)), "missing parents are made"
    assert not Path(tmp_path / "gone").exists()
