"""Inputs that need no data: they are what their names say, the same everywhere, and recipes take them."""

import numpy as np
import pytest

from merganser.errors import DataError, RecipeError
from merganser.evaluate.unlabeled import read_unlabeled
from merganser.prepare import random_texts
from merganser.recipe import read_recipe
from merganser.synthetic import PICTURES, is_source, pictures, token_texts


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures_are_the_same_each_time_and_differ_from_each_other(kind):
    drawn = pictures(f"{kind}:6")
    assert drawn.shape == (6, 64, 64, 3)
    assert drawn.dtype == np.uint8
    assert np.array_equal(drawn[:4], pictures(f"{kind}:4")), "more of them does not change the first"
    flat = drawn.reshape(6, -1).astype(float)
    assert (np.corrcoef(flat) - np.eye(6) < 0.95).all()
    assert flat.std(axis=1).min() > 5, "none is blank"


def slope(kind):
    """Return the slope of log power against log frequency."""
    grey = pictures(f"{kind}:40").mean(axis=3)
    power = (np.abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True))) ** 2).mean(axis=0)
    f = np.fft.fftfreq(64)
    radius = np.hypot(f[:, None], f[None])
    rings = [(low, power[(radius >= low) & (radius < 1.4 * low)].mean()) for low in (0.05, 0.08, 0.12, 0.18, 0.26)]
    x, y = np.log(np.array(rings)).T
    return np.polyfit(x, y, 1)[0]


def test_noise_is_white_and_dead_leaves_have_the_spectrum_of_photographs():
    assert abs(slope("noise")) < 0.2
    assert -3.2 < slope("dead-leaves") < -1.5, "photographs: about -2"


def test_dead_leaves_cover_everything_with_flat_regions():
    one = pictures("dead-leaves:3")[2].astype(int)
    steps = np.abs(np.diff(one, axis=1)).sum(axis=2)
    assert (steps == 0).mean() > 0.6, "most neighbours are of one disc"
    assert (steps > 30).any(), "edges are sharp"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("leaves:3", "unknown source"),
        ("noize:3", "did you mean 'noise'"),
        ("noise:0", "at least one"),
        ("tokens:3", "texts"),
    ],
)
def test_wrong_sources_are_named(text, says):
    with pytest.raises(DataError, match=says):
        pictures(text)


def test_sources_mix_with_files(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 32, 32, 1), np.uint8))
    mixed = read_unlabeled([tmp_path / "a.npz", "noise:3", "textures:2"])
    assert [one.shape for one in mixed] == [(32, 32, 1)] * 5 + [(64, 64, 3)] * 5
    (tmp_path / "t.txt").write_text("a sentence\n")
    with pytest.raises(DataError, match="mix texts and images"):
        read_unlabeled([tmp_path / "t.txt", "noise:3"])


def test_a_recipe_keeps_sources_as_they_are_written(tmp_path):
    (tmp_path / "r.toml").write_text(
        'sentences = ["ties"]\n[model]\nbase = "b"\n[experts]\na = "a"\n[tasks]\na = "t"\n'
        '[inputs]\nfiles = ["noise:3", "x.npz", "tokens:4"]\n'
    )
    files = read_recipe(tmp_path / "r.toml").inputs.files
    assert [str(f) for f in files] == ["noise:3", str(tmp_path / "x.npz"), "tokens:4"]
    assert is_source(files[0])


class Tokenizer:
    all_special_ids = (0, 3)

    def __len__(self):
        return 9

    def decode(self, ids):
        return " ".join(f"t{k}" for k in ids)


def test_texts_of_random_tokens_have_no_special_ones():
    texts = token_texts("tokens:50", Tokenizer(), words=8)
    assert texts == token_texts("tokens:50", Tokenizer(), words=8)
    used = {word for text in texts for word in text.split()}
    assert used == {f"t{k}" for k in (1, 2, 4, 5, 6, 7, 8)}
    assert {len(text.split()) for text in texts} == {8}
    with pytest.raises(RecipeError, match="needs a text encoder"):
        random_texts(object(), ["tokens:3"])
