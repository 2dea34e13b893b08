"""An expert in two is the expert: head(encoder(x)) equals transformers' own logits, for every family."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.errors import HeadError, WeightsError
from merganser.models.encoder import bound, call
from merganser.models.heads import Head, check_width
from merganser.models.hf import image_encoder, text_encoder
from merganser.models.split import DenseHead, encoder_weights, split_head

# model_type, prefix of transformers' classes, head, its own tensors
TEXT = [
    ("bert", "Bert", Head, {"classifier"}),
    ("roberta", "Roberta", DenseHead, {"classifier"}),
    ("xlm-roberta", "XLMRoberta", DenseHead, {"classifier"}),
    ("camembert", "Camembert", DenseHead, {"classifier"}),
    ("distilbert", "DistilBert", DenseHead, {"pre_classifier", "classifier"}),
    ("mpnet", "MPNet", DenseHead, {"classifier"}),
    ("electra", "Electra", DenseHead, {"classifier"}),
    ("deberta", "Deberta", DenseHead, {"pooler", "classifier"}),
    ("deberta-v2", "DebertaV2", DenseHead, {"pooler", "classifier"}),
]


@pytest.mark.parametrize(("kind", "stem", "head", "own"), TEXT, ids=[t[0] for t in TEXT])
def test_text_expert_on_a_plain_base(write, sentences, batch_of, kind, stem, head, own):
    base, _ = write(kind, f"{stem}Model")
    expert, model = write(kind, f"{stem}ForSequenceClassification", seed=1, num_labels=5)
    split = split_head(expert, base=base)
    encoder = text_encoder(base, pooling=split.pooling)
    batch = batch_of(encoder, sentences)
    with torch.no_grad():
        logits = split.head(call(encoder, encoder_weights(split.weights, encoder), batch))
        torch.testing.assert_close(logits, model(**batch).logits, atol=1e-5, rtol=0)
    assert type(split.head) is head
    assert {n.split(".")[0] for n in split.own} == own
    # the weights come under the base's names, and all of the expert is accounted for
    assert set(split.weights) <= set(load_file(base / "model.safetensors"))
    assert len(split.weights) + len(split.own) == len(load_file(expert / "model.safetensors"))


@pytest.mark.parametrize("with_pooler", [True, False])
def test_bert_pooler_is_shared_where_the_base_has_one(write, sentences, batch_of, with_pooler):
    base, _ = write("bert", "BertForPreTraining" if with_pooler else "BertForMaskedLM")
    expert, model = write("bert", "BertForSequenceClassification", seed=1, num_labels=3)
    split = split_head(expert, base=base)
    assert ("bert.pooler.dense.weight" in split.weights) is with_pooler
    assert ("bert.pooler.dense.weight" in split.own) is not with_pooler
    assert split.pooling == ("pooler" if with_pooler else "cls")
    encoder = text_encoder(base, pooling=split.pooling)
    batch = batch_of(encoder, sentences)
    with torch.no_grad():
        logits = split.head(call(encoder, encoder_weights(split.weights, encoder), batch))
        torch.testing.assert_close(logits, model(**batch).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("base_class", ["ViTModel", "ViTForImageClassification"])
def test_vit_expert(write, batch_of, base_class):
    base, _ = write("vit", base_class)
    expert, model = write("vit", "ViTForImageClassification", seed=1, num_labels=7)
    split = split_head(expert, base=base)
    assert isinstance(split.head, Head)
    assert split.pooling == "cls"
    encoder = image_encoder(base)
    pixels = batch_of(encoder, torch.randint(0, 256, (4, 24, 24, 3), dtype=torch.uint8))
    with torch.no_grad():
        logits = split.head(call(encoder, encoder_weights(split.weights, encoder), pixels))
        torch.testing.assert_close(logits, model(pixels).logits, atol=1e-5, rtol=0)


def test_clip_classifier(write, batch_of):
    base, _ = write("clip", "CLIPModel")
    expert, model = write("clip", "CLIPForImageClassification", seed=1, num_labels=4)
    split = split_head(expert, base=base)
    encoder = image_encoder(base, pooling=split.pooling)
    pixels = batch_of(encoder, torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8))
    with torch.no_grad():
        logits = split.head(call(encoder, encoder_weights(split.weights, encoder), pixels))
        torch.testing.assert_close(logits, model(pixels).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("base_class", ["BertModel", "BertForMaskedLM"])
@pytest.mark.parametrize("expert_class", ["BertModel", "BertForMaskedLM"])
def test_prefix_goes_both_ways(write, sentences, batch_of, base_class, expert_class):
    base, _ = write("bert", base_class)
    folder, model = write("bert", expert_class, seed=1)
    encoder = text_encoder(base, pooling="cls")
    weights = encoder_weights(load_file(folder / "model.safetensors"), encoder)
    assert set(weights) < set(load_file(base / "model.safetensors"))
    assert all(name.startswith("bert.") == (base_class != "BertModel") for name in weights)
    batch = batch_of(encoder, sentences)
    with torch.no_grad():
        hidden = getattr(model, "bert", model)(**batch).last_hidden_state
        torch.testing.assert_close(call(encoder, weights, batch), hidden[:, 0], atol=5e-6, rtol=0)


def test_old_layer_norm_names(write, tmp_path, sentences, batch_of):
    # bert-base-uncased on the hub still says gamma and beta; what is fine-tuned from it says weight and bias
    folder, model = write("bert", "BertModel")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in load_file(folder / "model.safetensors").items()
    }
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    save_file(old, tmp_path / "model.safetensors")
    encoder = text_encoder(tmp_path, pooling="pooler")
    batch = batch_of(encoder, sentences)
    new = encoder_weights(load_file(folder / "model.safetensors"), encoder)
    assert set(new) == set(old)
    with torch.no_grad():
        torch.testing.assert_close(encoder(batch), model(**batch).pooler_output, atol=5e-6, rtol=0)
        torch.testing.assert_close(call(encoder, new, batch), encoder(batch), atol=0, rtol=0)


def test_checkpoint_names_reach_every_parameter(write, sentences, batch_of):
    # transformers 5 renames ViT's layers on loading; the checkpoint's names must still reach them
    folder, _ = write("vit", "ViTModel")
    encoder = image_encoder(folder, pooling="pooler")
    weights = load_file(folder / "model.safetensors")
    assert len(bound(encoder, weights)) == len(weights) == len(list(encoder.parameters()))
    assert {encoder.prefix + n for n in weights} == {n for n, _ in encoder.named_parameters()}
    pixels = torch.randn(2, 3, 24, 24)
    for name, tensor in weights.items():
        if "key.bias" in name:  # softmax does not see it
            continue
        moved = call(encoder, {**weights, name: tensor + 0.5 * torch.randn_like(tensor)}, pixels)
        assert not torch.equal(moved, call(encoder, weights, pixels)), name
    leaves = {n: t.clone().requires_grad_() for n, t in weights.items()}
    call(encoder, leaves, pixels).square().sum().backward()
    assert all(t.grad is not None for t in leaves.values())


def test_split_without_base_keeps_the_experts_names(write):
    expert, model = write("roberta", "RobertaForSequenceClassification", num_labels=3)
    weights = load_file(expert / "model.safetensors")
    split = split_head(weights, model.config)
    assert {*split.weights, *split.own} == set(weights)
    assert all(torch.equal(split.weights[n], weights[n]) for n in split.weights)
    assert split_head(expert).own == split.own
    with pytest.raises(HeadError, match="width 32, the encoder gives 16"):
        check_width({"sentiment": split.head}, 16)


def test_errors(write, tmp_path):
    expert, _ = write("bert", "BertForSequenceClassification")
    plain, _ = write("bert", "BertModel")
    weights = load_file(expert / "model.safetensors")
    with pytest.raises(HeadError, match="give its head as a function"):
        split_head(weights, {"model_type": "funnel"})
    with pytest.raises(HeadError, match=r"'classifier\.weight' is missing"):
        split_head(plain)
    with pytest.raises(HeadError, match="config"):
        split_head(weights)
    with pytest.raises(WeightsError, match=r"no config\.json"):
        split_head(tmp_path)
    encoder = text_encoder(plain)
    del weights["bert.encoder.layer.0.output.dense.bias"]
    with pytest.raises(WeightsError, match=r"lack 'encoder.layer.0.output.dense.bias' of the encoder's"):
        encoder_weights(weights, encoder)
