"""Laws of whole merges, of any model: in memory, streamed and in parts they give the same bytes, kinds and shapes stay."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentences import SENTENCES, given_to

import merganser
from merganser.card import digest
from merganser.weights.open import open_weights

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # experts that are the base, models of nothing but integers
NAMES = ["embed.weight", "layers.0.weight", "layers.1.weight", "layers.1.bias", "norm", "conv", "head.weight", "ids"]
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
sides = st.integers(1, 5)
every_sentence = pytest.mark.parametrize("how", [*SENTENCES, "della(density=0.5) | average"])
few = settings(max_examples=4, deadline=None)


@st.composite
def models(draw):
    """Draw a base and two to four experts: tensors of any kinds and shapes, some of which an expert leaves as they are."""
    told = draw(st.dictionaries(st.sampled_from(NAMES), st.tuples(shapes, st.sampled_from(KINDS))))
    told["proj.weight"] = draw(
        st.tuples(st.tuples(sides, sides), st.sampled_from(KINDS[:-1]))
    )  # ingredients are for it
    told = {
        n: (shape[:1] if kind is torch.int64 else shape, kind) for n, (shape, kind) in told.items()
    }  # not quantised
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    base = {n: (9 * torch.randn(shape, generator=rng)).to(kind) for n, (shape, kind) in told.items()}
    still = draw(st.sets(st.sampled_from(sorted(told))))
    experts = {}
    for name in draw(st.sampled_from(["ab", "abc", "abcd"])):
        experts[name] = {
            n: t if n in still or not t.is_floating_point() else t + torch.randn(t.shape, generator=rng).to(t.dtype)
            for n, t in base.items()
        }
    return base, experts


def written(folder):
    return {p.name: p.read_bytes() for p in folder.glob("model*")}


@every_sentence
@given(models=models(), parts=st.integers(1, 4), size=st.sampled_from([60, 400, 10**9]), data=st.data())
@few
def test_memory_stream_and_parts_give_the_same_bytes(how, models, parts, size, data):
    base, experts = models
    experts, ingredients = given_to(how, base, experts)
    told = {"seed": parts, "ingredients": ingredients}
    memory = merganser.merge(base, experts, how, **told)
    assert {n: (t.dtype, t.shape) for n, t in memory.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for one, weights in {"base": base, **experts}.items():
            merganser.save(weights, root / one)
        sources = root / "base", {one: root / one for one in experts}
        stream = merganser.merge(*sources, how, into=root / "out", shard_size=size, **told)
        for k in data.draw(st.permutations(range(1, parts + 1))):
            merganser.merge(*sources, how, into=root / "parts", part=(k, parts), shard_size=size, **told)
        joined = merganser.join(root / "parts")
        assert digest(memory) == digest(stream) == digest(joined)
        assert written(root / "out") == written(root / "parts")
        assert digest(base) == digest(open_weights(root / "base")), "inputs stay as they were"


@every_sentence
@given(models=models())
@few
def test_experts_that_are_the_base_give_the_base(how, models):
    base, experts = models
    experts, ingredients = given_to(how, base, dict.fromkeys(experts, base))
    assert digest(merganser.merge(base, experts, how, ingredients=ingredients)) == digest(base)


@every_sentence
@given(models=models(), data=st.data())
@few
def test_the_order_of_tensors_does_not_matter(how, models, data):
    base, experts = models
    experts, ingredients = given_to(how, base, experts)
    order = data.draw(st.permutations(list(base)))
    turned = merganser.merge({n: base[n] for n in order}, experts, how, ingredients=ingredients)
    assert digest(turned) == digest(merganser.merge(base, experts, how, ingredients=ingredients))
