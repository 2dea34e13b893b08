"""Fisher information and Gram matrices measured through an encoder, against plain computations."""

import pytest
import torch
from torch import Tensor, nn

import merganser
from merganser.errors import DataError
from merganser.learn.measure import fisher, gram
from merganser.models.heads import linear_head
from merganser.models.inputs import Texts
from merganser.weights.open import open_weights


class Net(nn.Module):
    """Two layers of which the second is called once a token; dropout must be off while measuring."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(11, 4), nn.Dropout(0.5)
        self.first, self.second, self.unused = nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(3, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.drop(torch.tanh(self.first(self.embed(batch["input_ids"]))))
        mask = batch["attention_mask"][..., None]
        return (self.second(hidden) * mask).sum(1) / mask.sum(1)


@pytest.fixture
def texts() -> Texts:
    rng = torch.Generator().manual_seed(0)
    return Texts([torch.randint(1, 11, (k % 4 + 1,), generator=rng) for k in range(9)])


@pytest.fixture
def setting(texts):
    torch.manual_seed(0)
    net = Net().train()
    weights = {n: t.clone() for n, t in Net().state_dict().items()}
    return net, weights, linear_head(torch.randn(3, 5), torch.randn(3)), texts


def log_p(net, weights, head, batch) -> Tensor:
    net.eval()
    return head(torch.func.functional_call(net, weights, (batch,))).log_softmax(1)


def test_fisher_of_an_example_is_the_expected_square_of_its_score(setting) -> None:
    net, weights, head, texts = setting
    wanted = {n: torch.zeros_like(t) for n, t in weights.items()}
    for k in range(len(texts)):
        batch = texts.take(torch.tensor([k]))
        for y in range(3):
            grads = torch.func.grad(lambda w, b=batch, y=y: log_p(net, w, head, b)[0, y])(weights)
            p = log_p(net, weights, head, batch)[0, y].exp().detach()
            for n in wanted:
                wanted[n] += p * grads[n].square() / len(texts)
    measured = fisher(net, weights, head, texts, per="example")
    assert set(measured) == set(weights)
    for n in wanted:
        torch.testing.assert_close(measured[n], wanted[n], rtol=1e-4, atol=1e-7)
    assert not measured["unused.weight"].any()
    assert not measured["embed.weight"][0].any(), "padding is never read with weight"


def test_fisher_of_batches_squares_after_the_sum(setting) -> None:
    net, weights, head, texts = setting
    order = torch.argsort(texts.lengths, stable=True)
    wanted = torch.zeros(5, 6)
    for at in order.split(4):

        def score(w: dict, at: Tensor = at) -> Tensor:
            lp = log_p(net, w, head, texts.take(at))
            return (lp.exp().sqrt().detach() * lp).sum()

        wanted += torch.func.grad(score)(weights)["second.weight"].square() / len(texts)
    measured = fisher(net, weights, head, texts, batch=4)
    torch.testing.assert_close(measured["second.weight"], wanted, rtol=1e-4, atol=1e-7)
    other = fisher(net, weights, head, texts, batch=9)["second.weight"]
    assert not torch.allclose(other, wanted, rtol=1e-2), "as published, it depends on the batch"


def test_gram_is_of_every_token_that_reaches_a_layer(setting) -> None:
    net, weights, _, texts = setting
    measured = gram(net, weights, texts, batch=1)
    assert set(measured) == {"first.weight", "second.weight"}, "a layer that is not called has no inputs"
    tokens = nn.functional.embedding(torch.cat(texts.ids), weights["embed.weight"])
    torch.testing.assert_close(measured["first.weight"], tokens.mT @ tokens / len(tokens), rtol=1e-5, atol=1e-6)
    hidden = torch.tanh(tokens @ weights["first.weight"].mT + weights["first.bias"])
    torch.testing.assert_close(measured["second.weight"], hidden.mT @ hidden / len(hidden), rtol=1e-5, atol=1e-6)


def test_measuring_leaves_the_encoder_as_it_was(setting) -> None:
    net, weights, head, texts = setting
    before = {n: t.clone() for n, t in net.state_dict().items()}
    fisher(net, weights, head, texts)
    gram(net, weights, texts)
    assert net.training
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert not any(t.requires_grad for t in weights.values())
    assert all(p.grad is None for p in net.parameters())


def test_names_are_the_checkpoints(setting) -> None:
    net, weights, head, texts = setting
    wrapped = nn.Sequential()
    wrapped.add_module("model", net)
    wrapped.prefix = "model."
    halves = {n: t.bfloat16() for n, t in weights.items()} | {"head.weight": torch.ones(2)}
    measured = fisher(wrapped, halves, head, texts)
    assert set(measured) == set(weights)
    assert all(t.dtype == torch.float32 for t in measured.values())
    assert set(gram(wrapped, weights, texts)) == {"first.weight", "second.weight"}


def test_tied_parameters_are_measured_under_both_names(setting) -> None:
    net, _, head, texts = setting
    net.again = net.second
    weights = {n: t.clone() for n, t in net.state_dict().items()}
    for measured in (fisher(net, weights, head, texts), gram(net, weights, texts)):
        assert measured["second.weight"].any()
        assert torch.equal(measured["again.weight"], measured["second.weight"])


def test_measured_ingredients_are_weights_and_merge(setting, tmp_path) -> None:
    net, base, head, texts = setting
    rng = torch.Generator().manual_seed(1)
    experts = {k: {n: t + 0.1 * torch.randn(t.shape, generator=rng) for n, t in base.items()} for k in "ab"}
    for what, step in (("fisher", "fisher(normalize=False)"), ("gram", "regmean")):
        measured = {}
        for k, w in experts.items():
            one = fisher(net, w, head, texts) if what == "fisher" else gram(net, w, texts)
            merganser.save(one, tmp_path / what / k)
            measured[k] = tmp_path / what / k
            stored = open_weights(measured[k])
            assert all(torch.equal(stored[n], one[n]) for n in one)
        merged = merganser.merge(base, experts, step, ingredients={what: measured})
        mean = merganser.merge(base, experts, "average")
        assert not torch.allclose(merged["second.weight"], mean["second.weight"], atol=1e-4)
        torch.testing.assert_close(merged["unused.weight"], mean["unused.weight"])


def test_nothing_to_measure_is_told(setting) -> None:
    net, weights, head, texts = setting
    with pytest.raises(DataError, match="no inputs"):
        fisher(net, weights, head, Texts([]))
    with pytest.raises(DataError, match=r"no torch.nn.Linear"):
        gram(nn.Embedding(11, 4), {"weight": torch.ones(11, 4)}, torch.arange(5))
    for knob in ({"batch": 0}, {"per": "token"}):
        with pytest.raises(ValueError, match=next(iter(knob))):
            fisher(net, weights, head, texts, **knob)
    with pytest.raises(ValueError, match="batch"):
        gram(net, weights, texts, batch=0)
