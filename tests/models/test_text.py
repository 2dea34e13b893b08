"""Text encoders give what transformers gives, pooled; whatever the batch, whatever the order."""

import json
import shutil

import pytest
import torch

from merganser.errors import DataError, HeadError, MissingExtra, WeightsError
from merganser.models.encoder import features
from merganser.models.hf import text_encoder
from merganser.models.inputs import Texts

FAMILIES = [
    ("bert", "BertModel"),
    ("roberta", "RobertaForMaskedLM"),
    ("distilbert", "DistilBertForMaskedLM"),
    ("mpnet", "MPNetModel"),
    ("electra", "ElectraModel"),
    ("deberta-v2", "DebertaV2Model"),
]


@pytest.mark.parametrize(("kind", "name"), FAMILIES, ids=[f[0] for f in FAMILIES])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pools_the_models_own_output(write, sentences, kind, name, pooling):
    folder, model = write(kind, name)
    encoder = text_encoder(folder, pooling=pooling)
    inner = getattr(model, model.base_model_prefix, model)
    for k, row in enumerate(features(encoder, {}, encoder.prepare(sentences), kind="fp32")):
        ids = torch.tensor([encoder.tokenizer(sentences[k])["input_ids"]])  # alone, hence without padding
        with torch.no_grad():
            hidden = inner(ids).last_hidden_state[0]
        torch.testing.assert_close(row, hidden.mean(0) if pooling == "mean" else hidden[0], atol=1e-5, rtol=0)


def test_pooler(write, sentences, batch_of):
    folder, model = write("bert", "BertModel")
    encoder = text_encoder(folder, pooling="pooler")
    batch = batch_of(encoder, sentences)
    with torch.no_grad():
        torch.testing.assert_close(encoder(batch), model(**batch).pooler_output, atol=5e-6, rtol=0)


def test_unread_pooler_is_no_parameter(write, sentences, batch_of):
    # else adapting would meet parameters without a gradient
    encoder = text_encoder(write("bert", "BertModel")[0], pooling="mean")
    assert not any("pooler" in n for n, _ in encoder.named_parameters())
    encoder(batch_of(encoder, sentences)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


@pytest.mark.parametrize("size", [1, 2, 3, 256])
def test_features_do_not_depend_on_the_batch(write, sentences, size):
    encoder = text_encoder(write("bert", "BertModel")[0])
    inputs = encoder.prepare(sentences * 3)
    whole = features(encoder, {}, inputs, kind="fp32")
    torch.testing.assert_close(features(encoder, {}, inputs, batch=size, kind="fp32"), whole, atol=5e-6, rtol=0)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(size))
    shuffled = Texts([inputs.ids[k] for k in order.tolist()], inputs.pad)
    torch.testing.assert_close(
        features(encoder, {}, shuffled, batch=size, kind="fp32"), whole[order], atol=5e-6, rtol=0
    )


def test_features_leave_the_encoder_as_it_was(write, sentences):
    encoder = text_encoder(write("bert", "BertModel")[0]).train()
    inputs = encoder.prepare(sentences)
    first = features(encoder, {}, inputs)
    assert encoder.training  # and yet dropout was off
    assert torch.equal(features(encoder, {}, inputs), first)


def test_prepare_cuts_and_pads(write):
    folder, _ = write("roberta", "RobertaModel", pad_token_id=1, vocab_size=40)
    says = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(says | {"pad_token": "[UNK]"}))
    encoder = text_encoder(folder, length=5)
    inputs = encoder.prepare(["a dog", "the cat sits on the mat", ""])
    assert inputs.lengths.tolist() == [4, 5, 2]
    assert inputs.pad == 1
    batch = inputs.take(torch.tensor([2, 1]))
    assert batch["input_ids"].tolist()[0] == [2, 3, 1, 1, 1]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert inputs.take(torch.tensor([2]))["input_ids"].shape == (1, 2)  # padded to its own longest
    assert len(encoder.prepare([])) == 0
    with pytest.raises(DataError, match="text 1 is a NoneType"):
        encoder.prepare(["a", None])


@pytest.mark.parametrize(("kind", "name", "length"), [("bert", "BertModel", 40), ("roberta", "RobertaModel", 38)])
def test_never_more_tokens_than_the_model_reads(write, batch_of, kind, name, length):
    encoder = text_encoder(write(kind, name, pad_token_id=1)[0], length=1000)
    batch = batch_of(encoder, ["cat " * 100])
    assert batch["input_ids"].shape == (1, length)
    assert encoder(batch).isfinite().all()


def test_prompts_are_features_of_the_base(write, sentences):
    encoder = text_encoder(write("bert", "BertModel")[0])
    expected = features(encoder, {}, encoder.prepare(sentences), kind="fp32")
    assert torch.equal(encoder.prompts(sentences), expected)


def test_auto_pooling(write, tmp_path):
    plain, _ = write("bert", "BertModel")
    assert text_encoder(plain, pooling="auto").pooling == "mean"
    assert text_encoder(write("bert", "BertForSequenceClassification")[0], pooling="auto").pooling == "pooler"
    assert text_encoder(write("roberta", "RobertaForSequenceClassification")[0], pooling="auto").pooling == "cls"
    assert text_encoder(write("distilbert", "DistilBertForSequenceClassification")[0], pooling="auto").pooling == "cls"

    def pooled(says):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(plain, folder)
        (folder / "pool").mkdir()
        (folder / "pool" / "config.json").write_text(json.dumps(says))
        modules = [{"path": "", "type": "models.Transformer"}, {"path": "pool", "type": "models.Pooling"}]
        (folder / "modules.json").write_text(json.dumps(modules))
        return text_encoder(folder, pooling="auto").pooling

    assert pooled({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}) == "cls"
    assert pooled({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}) == "mean"
    assert pooled({"pooling_mode": "cls"}) == "cls"
    with pytest.raises(HeadError, match="max_tokens"):
        pooled({"pooling_mode_max_tokens": True})


def test_errors(write, tmp_path, monkeypatch):
    folder, _ = write("bert", "BertForMaskedLM")
    with pytest.raises(HeadError, match="no pooler: use pooling='cls'"):
        text_encoder(folder, pooling="pooler")
    with pytest.raises(HeadError, match="did you mean 'mean'"):
        text_encoder(folder, pooling="means")
    with pytest.raises(DataError, match="length must be at least 1, got 0"):
        text_encoder(folder, length=0)
    with pytest.raises(WeightsError, match=r"no config\.json"):
        text_encoder(tmp_path / "nowhere")
    shutil.copytree(folder, tmp_path / "wide")
    says = json.loads((folder / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(says | {"num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match=r"lacks 'encoder.layer.2"):
        text_encoder(tmp_path / "wide")
    (tmp_path / "wide" / "config.json").write_text(json.dumps(says | {"hidden_size": 48}))
    with pytest.raises(WeightsError, match="cannot load it"):
        text_encoder(tmp_path / "wide")
    vision = write("vit", "ViTModel")[0]
    shutil.copy(folder / "tokenizer.json", vision)
    shutil.copy(folder / "tokenizer_config.json", vision)
    with pytest.raises(WeightsError, match="'vit' reads pixel_values, not input_ids"):
        text_encoder(vision)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'merganser\[hf\]'"):
        text_encoder(folder)


def test_loading_is_quiet_and_puts_the_settings_back(write, capfd):
    from transformers.utils import logging

    folder, _ = write("bert", "BertForMaskedLM")
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    capfd.readouterr()
    try:
        text_encoder(folder)
        assert capfd.readouterr() == ("", "")
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
