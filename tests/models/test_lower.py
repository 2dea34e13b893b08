"""The part below the first trained tensor is run once, and what it gives is what the whole network gives."""

import numpy as np
import pytest
import torch
from torch import nn

from merganser.models.encoder import bound, features
from merganser.models.heads import Head
from merganser.models.lower import lower
from merganser.models.open import open_encoder
from merganser.steps.adapt.ri import ri
from merganser.steps.moving import Moving, last_blocks
from merganser.steps.student import Student
from merganser.weights.stored import Stored

TEXTS = ["the cat sits on the mat .", "a dog", "red birds runs fast , slow", "blue", "the photo of a car", "a cat sits"]
LAST = {  # the second of two blocks, as each architecture names it
    "bert": "encoder.layer.1.",
    "roberta": "encoder.layer.1.",
    "distilbert": "transformer.layer.1.",
    "electra": "encoder.layer.1.",
    "vit": "encoder.layer.1.",
    "clip": "vision_model.encoder.layers.1.",
}
NAMES = {"bert": "BertModel", "roberta": "RobertaModel", "distilbert": "DistilBertModel", "electra": "ElectraModel",
         "vit": "ViTModel", "clip": "CLIPModel"}  # fmt: skip


def opened(write, kind):
    folder, _ = write(kind, NAMES[kind])
    if kind in ("vit", "clip"):
        encoder = open_encoder("image", folder)
        raw = np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), dtype=np.uint8)
    else:
        encoder, raw = open_encoder("text", folder, length=16), TEXTS
    base = {n: t.float() for n, t in Stored(folder).items() if t.is_floating_point()}
    base = {n: t for n, t in base.items() if bound(encoder, {n: t})}
    return encoder, base, encoder.prepare(raw)


def student(encoder, weights, inputs, names):
    return Student(weights, encoder, inputs, Moving({n: weights[n] for n in names}), "fp32")


@pytest.mark.parametrize("kind", list(LAST))
def test_features_and_gradients_are_those_of_the_whole_network(write, kind):
    encoder, base, inputs = opened(write, kind)
    names = [n for n in base if LAST[kind] in f"{n}."]
    assert names, "the last block's tensors"
    found = []
    for parted in (False, True):
        one = student(encoder, base, inputs, names)
        if parted:
            one.remember_lower(torch.arange(len(inputs)))
            assert one.lower is not None
            assert one.lower.cut == 1
        for parameter in one.moving.params.values():
            parameter.requires_grad_()
        out = [one(at) for at in (torch.tensor([3, 0, 5]), torch.tensor([1, 2, 4]))]
        sum(x.square().sum() for x in out).backward()
        found.append((torch.cat(out).detach(), {n: p.grad for n, p in one.moving.params.items()}))
    (whole, grads), (skipped, same) = found
    torch.testing.assert_close(skipped, whole, rtol=1e-4, atol=1e-4)
    assert any(g is not None and g.abs().max() > 0 for g in grads.values())
    for name, g in grads.items():
        if g is not None:
            torch.testing.assert_close(same[name], g, rtol=1e-3, atol=1e-3 * float(g.abs().max()) + 1e-6)
    after = features(encoder, base, inputs, kind="fp32")
    torch.testing.assert_close(
        after[[3, 0, 5, 1, 2, 4]], whole, rtol=1e-4, atol=1e-4
    )  # the encoder itself is as it was


def test_blocks_below_are_not_run_again(write):
    encoder, base, inputs = opened(write, "bert")
    calls = []
    block = encoder.model.encoder.layer[0]
    block.intermediate.register_forward_hook(lambda *_: calls.append(1))
    one = student(encoder, base, inputs, [n for n in base if "layer.1." in n])
    one.remember_lower(torch.arange(len(inputs)))
    calls.clear()
    one(torch.arange(3))
    assert not calls
    features(encoder, base, inputs)
    assert calls


class Stack(nn.Module):
    """Blocks in a row, something before and something behind them."""

    def __init__(self, turns=1, first=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6) if first else nn.Identity()
        self.blocks = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
        self.between = nn.LayerNorm(6)
        self.turns = turns
        self.token = nn.Parameter(torch.randn(6))

    def forward(self, x):
        x = self.first(x) + self.token
        for _ in range(self.turns):
            for k, block in enumerate(self.blocks):
                x = block(x).relu()
                x = self.between(x) if k == 2 else x
        return x


@pytest.mark.parametrize(
    ("trained", "cut"),
    [
        ({"blocks.3.weight"}, 3),
        ({"blocks.1.bias", "blocks.3.weight"}, 1),
        ({"between.weight"}, 2),  # it stands between the third block and the fourth, so the third is run again
        ({"blocks.0.weight"}, None),
        ({"first.weight", "blocks.3.weight"}, None),
        ({"token", "blocks.3.weight"}, None),  # the network's own: when it is used cannot be told
    ],
)
def test_the_cut_lies_below_the_first_trained_tensor(trained, cut):
    net, inputs = Stack().eval(), torch.randn(9, 5)
    tensors = {n: p.detach().clone() for n, p in net.named_parameters()}
    found = lower(net, tensors, trained, inputs, "fp32")
    assert (found.cut if found else None) == cut
    if found:
        found.remember(tensors, torch.arange(2, 9))
        moved = {n: t + 0.1 if n in trained else t for n, t in tensors.items()}
        wanted = torch.func.functional_call(net, moved, (inputs[[4, 2]],))
        torch.testing.assert_close(found(moved, torch.tensor([4, 2])), wanted)


def test_blocks_that_run_twice_or_hand_on_more_are_run_whole():
    net, inputs = Stack(turns=2).eval(), torch.randn(9, 5)
    tensors = {n: p.detach() for n, p in net.named_parameters()}
    assert lower(net, tensors, {"blocks.3.weight"}, inputs, "fp32") is None

    class Skips(Stack):
        def forward(self, x):  # the second block's output is used again at the end
            x = self.first(x)
            kept = [x := block(x) for block in self.blocks]
            return kept[-1] + kept[1]

    net = Skips().eval()
    tensors = {n: p.detach() for n, p in net.named_parameters()}
    assert lower(net, tensors, {"blocks.3.weight"}, inputs, "fp32") is None


def test_a_language_model_is_parted_too(write):
    folder, _ = write("gpt2", "GPT2LMHeadModel")
    from merganser.models.causal import causal_lm

    model = causal_lm(folder)
    base = {n: t.float() for n, t in Stored(folder).items() if t.is_floating_point()}
    inputs = model.tokens(TEXTS)
    names = [n for n in base if ".h.1." in n]
    one, two = (student(model, base, inputs, names) for _ in range(2))
    two.remember_lower(torch.arange(len(inputs)))
    assert two.lower is not None
    at = torch.tensor([2, 0, 1])
    mask = inputs.take(at)["attention_mask"].bool()
    torch.testing.assert_close(two(at)[mask], one(at)[mask], rtol=1e-4, atol=1e-4)


def test_ri_of_the_last_block_moves_it_alone_and_is_what_it_is_without_skipping(write, monkeypatch):
    encoder, base, inputs = opened(write, "bert")
    torch.manual_seed(1)
    expert = {n: t + 0.05 * torch.randn_like(t) for n, t in base.items()}
    heads = {name: Head(torch.randn(3, 32), None) for name in ("one", "two")}
    how = {"own": "one", "encoder": encoder, "steps": 5, "lr": 1e-2, "batch": 3, "held_out": 0, "_precision": "fp32"}
    out = ri(expert, base, heads, inputs, blocks=1, **how)
    assert {n for n in out if not torch.equal(out[n], expert[n])} <= {n for n in base if "layer.1." in n}
    assert not torch.equal(out["encoder.layer.1.output.dense.weight"], expert["encoder.layer.1.output.dense.weight"])
    monkeypatch.setattr(Student, "remember_lower", lambda *_: None)
    whole = ri(expert, base, heads, inputs, blocks=1, **how)
    # not tensor by tensor: a key's bias has no gradient but rounding, which Adam makes steps of
    one, two, start = (features(encoder, weights, inputs, kind="fp32") for weights in (out, whole, expert))
    assert (one - two).norm() < 1e-2 * (one - start).norm()
    with pytest.raises(ValueError, match="the network has 2 numbered blocks"):
        ri(expert, base, heads, inputs, blocks=3, **how)
    with pytest.raises(ValueError, match="blocks must not be negative"):
        ri(expert, base, heads, inputs, blocks=-1, **how)


def test_the_last_blocks_by_their_names():
    names = [
        "embed.weight",
        *(f"h.{k}.{part}.weight" for k in range(12) for part in ("attn", "mlp.0", "mlp.1")),
        "norm.weight",
    ]
    assert last_blocks(names, 2) == [n for n in names if n.startswith(("h.10.", "h.11."))]
    assert last_blocks(["0.weight", "1.weight", "2.weight"], 1) == ["2.weight"]
