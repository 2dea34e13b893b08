"""Tiny random transformers models, written to disk with their own library, and a tiny tokenizer."""

import json

import pytest
import torch

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a the photo of cat dog bird car red blue sits runs fast slow on mat ##s ##ed . ,"
)
SENTENCES = [
    "the cat sits on the mat .",
    "a dog",
    "red birds runs fast , slow",
    "blue",
    "the photo of a car unknownword",
]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


def write_tokenizer(folder, bos="[CLS]", eos="[SEP]", length=40):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {word: k for k, word in enumerate(WORDS.split())}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, vocab[bos]), (eos, vocab[eos])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    says = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    says |= {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": bos, "sep_token": eos, "mask_token": "[MASK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(says))


def config_of(kind, **more):
    import transformers

    words = {"vocab_size": len(WORDS.split()), "pad_token_id": 0, "max_position_embeddings": 40, **more}
    if kind == "distilbert":
        return transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=40, **words)
    if kind == "vit":
        return transformers.ViTConfig(**SMALL, image_size=24, patch_size=8, **more)
    if kind == "clip":
        text = {**SMALL, **words, "bos_token_id": 2, "eos_token_id": 3}
        vision = {**SMALL, "image_size": 24, "patch_size": 8}
        return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, **more)
    if kind == "electra":
        words["embedding_size"] = 32
    return transformers.AutoConfig.for_model(kind, **SMALL, **words)


@pytest.fixture(scope="session")
def write(tmp_path_factory):
    """Return ``write(kind, class name, **config) -> (folder, model)``; each tensor is random, biases and norms too."""
    transformers = pytest.importorskip("transformers", reason="the 'hf' extra is not installed")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    def build(kind, name, seed=0, **more):
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config_of(kind, **more)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
        model.save_pretrained(folder)
        if kind != "vit":
            write_tokenizer(folder)
        return folder, model

    return build


@pytest.fixture(scope="session")
def sentences():
    return SENTENCES


@pytest.fixture
def batch_of():
    """Return ``batch_of(encoder, raw) -> batch`` of all of ``raw``."""
    return lambda encoder, raw: encoder.prepare(raw).take(torch.arange(len(raw)))
