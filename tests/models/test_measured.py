"""Ingredients are measured through transformers' networks too, under the names of their checkpoints."""

import numpy as np
import pytest
import torch

from merganser.learn.entering import entering
from merganser.learn.measure import fisher, gram
from merganser.models.encoder import bound
from merganser.models.heads import linear_head
from merganser.models.open import open_encoder
from merganser.weights.stored import Stored

NAMES = {"bert": "BertModel", "vit": "ViTModel"}


@pytest.mark.parametrize("kind", list(NAMES))
def test_layers_are_found_under_stored_names(write, sentences, kind):
    folder, _ = write(kind, NAMES[kind])
    if kind == "vit":
        encoder = open_encoder("image", folder)
        inputs = encoder.prepare(np.random.default_rng(0).integers(0, 256, (6, 24, 24, 3), dtype=np.uint8))
    else:
        encoder = open_encoder("text", folder)
        inputs = encoder.prepare(sentences)
    base = {n: t.float() for n, t in Stored(folder).items() if t.is_floating_point()}
    base = {n: t for n, t in base.items() if bound(encoder, {n: t})}
    layers = {
        n for n, t in base.items() if n.endswith("weight") and t.ndim == 2 and "embed" not in n and "pooler" not in n
    }
    assert layers
    products, rows = gram(encoder, base, inputs), entering(encoder, base, inputs, rows=8)
    assert layers <= set(products)
    assert layers <= set(rows)
    assert all(products[n].shape == (base[n].shape[1],) * 2 for n in layers)
    assert all(rows[n].shape == (8, base[n].shape[1]) for n in layers)
    assert all(rows[n].any() for n in layers)
    width = encoder(inputs.take(torch.tensor([0]))).shape[1]
    measured = fisher(encoder, base, linear_head(torch.randn(3, width)), inputs)
    assert all(measured[n].any() for n in layers)
