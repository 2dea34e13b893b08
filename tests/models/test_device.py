"""Networks run on another device, everything else stays in main memory: shown with tensors that refuse to be mixed.

No machine of ours has an accelerator, so one is stood in for: a subclass of tensors that runs on the CPU, but raises, as
torch does, where an operation takes one of its own beside a plain one. Results must be those of the CPU, bit by bit.
"""

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from merganser.errors import RecipeError
from merganser.evaluate.run import Labelled
from merganser.learn.coefficients import adamerging
from merganser.learn.entering import entering
from merganser.learn.measure import fisher, gram
from merganser.models import device as rooms
from merganser.models.encoder import features
from merganser.models.heads import Head
from merganser.models.inputs import Prompts, Texts
from merganser.models.statistics import reset_statistics
from merganser.steps.adapt.coadapt import coadapt
from merganser.steps.adapt.distac import distac
from merganser.steps.adapt.ri import ri
from merganser.suites.finetune import finetune
from merganser.train import Checkpoint, Plan

SHORT = {"steps": 6, "lr": 3e-3, "batch": 8, "held_out": 0.2, "_precision": "fp32"}


class Far(Tensor):
    """A tensor on the device that stands in for an accelerator."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim]
            if func in (Tensor.__getitem__, Tensor.copy_, Tensor.to):  # torch takes indices, and copies, from anywhere
                tensors = tensors[:1]
            if len({isinstance(t, Far) for t in tensors}) > 1:
                raise RuntimeError(f"{func.__name__}: tensors on two devices")
            found = func(*args, **(kwargs or {}))
            goes_to = Tensor if func is Tensor.cpu else Far
            return tree_map_only(Tensor, lambda t: t if type(t) is nn.Parameter else t.as_subclass(goes_to), found)


def there(x):
    if isinstance(x, dict):
        return {name: there(one) for name, one in x.items()}
    return x.as_subclass(Far) if isinstance(x, Tensor) else x


def placed(network):
    for module in network.modules():
        for kept in (module._parameters, module._buffers):
            kept |= {name: t.detach().as_subclass(Far) for name, t in kept.items() if t is not None}
    return network


@pytest.fixture
def far(monkeypatch):
    """Run networks on the stand-in."""

    def switch():
        for name, module in list(sys.modules.items()):
            if name.startswith("merganser"):
                for word, ours in (("there", there), ("placed", placed)):
                    if vars(module).get(word) is getattr(rooms, word) and module is not rooms:
                        monkeypatch.setattr(module, word, ours)

    return switch


class Net(nn.Module):
    """Matrices, batch norm, and a constant that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.register_buffer("shift", torch.full((6,), 0.1), persistent=False)

    def forward(self, x):
        return self.inner(x + self.shift)


def made():
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = Net().eval()
    base = {name: t.clone() for name, t in net.state_dict().items()}
    noise = {n: 0.1 * torch.randn(t.shape, generator=rng) for n, t in base.items() if t.is_floating_point()}
    expert = {n: t + noise[n].abs() if n in noise else t for n, t in base.items()}
    heads = {name: Head(torch.randn(3, 8, generator=rng), None, True) for name in ("a", "b")}
    inputs = torch.randn(40, 6, generator=rng)
    labels = torch.randint(3, (40,), generator=rng)
    task = Labelled(inputs, labels.numpy())
    return net, base, expert, heads, inputs, task


class Speaker(nn.Module):
    """Logits of the next of five tokens from the one before."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 6), nn.Linear(6, 5)

    def forward(self, batch):
        return self.out(torch.tanh(self.embed(batch["input_ids"])))


def spoken():
    """Return what adapting language models gives."""
    torch.manual_seed(0)
    net = Speaker().eval()
    base = {name: t.clone() for name, t in net.state_dict().items()}
    experts = {who: {n: t + 0.3 * torch.randn(t.shape) for n, t in base.items()} for who in ("a", "b")}
    texts = Texts([torch.randint(5, (4 + k % 3,)) for k in range(24)])
    inputs = Prompts(texts, torch.arange(24) % 3 - 1, ("a", "b"))
    given = {"own": "a", "encoder": net, "top": 3, **SHORT}
    return {
        "ri": ri(experts["a"], base, {}, inputs, **given),
        "coadapt": coadapt(experts["a"], base, {}, inputs, others={"b": experts["b"]}, **given),
    }


def results(folder):
    """Return what everything that runs a network gives."""
    net, base, expert, heads, inputs, task = made()
    given = (expert, base, heads, inputs)
    found = {"features": {"x": features(net, expert, inputs, kind="fp32")}}
    found["ri"] = ri(*given, own="a", encoder=net, **SHORT)
    found["ri low"] = ri(*given, own="a", encoder=net, rank=2, **SHORT)
    found["ri features"] = ri(*given, own="a", encoder=net, form="features", **SHORT)
    found["ri pulled"] = ri(*given, own="a", encoder=net, pull=0.5, **SHORT)
    other = {n: t + noise for (n, t), noise in zip(base.items(), expert.values(), strict=True) if t.is_floating_point()}
    found["coadapt"] = coadapt(*given, own="a", encoder=net, others={"b": {**base, **other}}, **SHORT)
    found["coefficients"] = adamerging(
        base, {"a": expert, "b": {**base, **other}}, encoder=net, heads=heads, inputs=inputs, steps=3, kind="fp32"
    )
    found["distac"] = distac(*given, own="a", encoder=net, **SHORT)
    found["statistics"] = reset_statistics(net, expert, inputs, batch=8, kind="fp32")
    found["fisher"] = fisher(net, expert, heads["a"], inputs)
    found["gram"] = gram(net, expert, inputs)
    found["entering"] = entering(net, expert, inputs, rows=16)
    kept = Checkpoint(folder / "checkpoint.safetensors", every=0.0)
    found["fine-tuned"] = finetune(base, net, heads["a"], task, Plan(4, 1e-2), batch=8, kind="fp32", checkpoint=kept)
    found["taken up"] = finetune(base, net, heads["a"], task, Plan(6, 1e-2), batch=8, kind="fp32", checkpoint=kept)
    return found


def test_results_are_in_main_memory_and_those_of_the_cpu(far, tmp_path):
    wanted = {**results(tmp_path / "near"), **{f"spoken {k}": v for k, v in spoken().items()}}
    far()
    found = {**results(tmp_path / "far"), **{f"spoken {k}": v for k, v in spoken().items()}}
    for what, tensors in wanted.items():
        for name, tensor in tensors.items():
            assert type(found[what][name]) is Tensor, (what, name)
            assert torch.equal(found[what][name], tensor), (what, name)


def test_the_stand_in_refuses_to_be_mixed():
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="two devices"):
        there(x) + x
    with pytest.raises(RuntimeError, match="two devices"):
        nn.functional.linear(there(torch.ones(2, 3)), torch.ones(4, 3))
    assert type((there(x) * 2).cpu()) is Tensor


def test_a_device_that_is_not_here_is_one_clear_error(monkeypatch):
    monkeypatch.setenv(rooms.VARIABLE, "cpu")
    assert rooms.device() == torch.device("cpu")
    for wrong in ("gpu", "xpu:7"):
        monkeypatch.setenv(rooms.VARIABLE, wrong)
        with pytest.raises(RecipeError, match=f"{rooms.VARIABLE}={wrong}: .*unset it"):
            rooms.device()
