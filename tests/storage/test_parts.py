"""Models of several folders (sentence-transformers): read, merged and written whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser
from merganser.card import digest
from merganser.errors import WeightsError
from merganser.weights.open import open_weights
from merganser.weights.sink import Sink, spec_of
from merganser.weights.stored import INDEX, Stored

KIND = "sentence_transformers.models."


def parts(seed):
    rng = torch.Generator().manual_seed(seed)
    return {
        "": {"embeddings.weight": torch.randn(9, 4, generator=rng), "layer.0.bias": torch.randn(4, generator=rng)},
        "2_Dense": {"linear.weight": torch.randn(3, 4, generator=rng), "linear.bias": torch.randn(3, generator=rng)},
        "3_Dense": {"linear.weight": torch.randn(2, 3, generator=rng)},
    }


def whole(seed):
    return {f"{part}/{n}" if part else n: t for part, held in parts(seed).items() for n, t in held.items()}


def modules(folder, paths):
    listed = [{"idx": k, "name": str(k), "path": path, "type": KIND + path[2:]} for k, path in enumerate(paths)]
    (folder / "modules.json").write_text(json.dumps(listed))


def lay_out(folder, seed, pickled=False):
    """Make a folder as SentenceTransformer.save does: transformer at the root, a pooling, two dense layers."""
    for part in ("", "1_Pooling", "2_Dense", "3_Dense", "plain"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps({"part": part}))
    for part, held in parts(seed).items():
        if pickled and part == "3_Dense":
            torch.save(held, folder / part / "pytorch_model.bin")
        else:
            save_file(held, folder / part / "model.safetensors", {"format": "pt"})
    save_file({"stray": torch.ones(1)}, folder / "plain" / "model.safetensors")
    modules(folder, ["", "1_Pooling", "2_Dense", "3_Dense"])
    return folder


@pytest.mark.parametrize("pickled", [False, True])
def test_all_modules_are_one_model(tmp_path, pickled):
    stored = Stored(lay_out(tmp_path, 1, pickled))
    assert set(stored) == set(whole(1))
    assert all(torch.equal(stored[name], tensor) for name, tensor in whole(1).items())
    assert all(torch.equal(stored.flat(name), tensor.reshape(-1)) for name, tensor in whole(1).items())
    assert digest(stored) == digest(whole(1))
    (tmp_path / "modules.json").unlink()
    assert set(Stored(tmp_path)) == set(parts(1)[""]), "a folder beside a model is not part of it"


def test_merged_whole_with_the_configs_of_the_modules(tmp_path):
    for k in range(3):
        lay_out(tmp_path / str(k), k, pickled=k == 2)
    merged = merganser.merge(
        tmp_path / "0", {"a": tmp_path / "1", "b": tmp_path / "2"}, "average", into=tmp_path / "out"
    )
    assert set(merged) == set(whole(0))
    for part, held in parts(0).items():
        written = load_file(tmp_path / "out" / part / "model.safetensors")
        assert written.keys() == held.keys()
        for name in held:
            torch.testing.assert_close(written[name], (parts(1)[part][name] + parts(2)[part][name]) / 2)
        assert json.loads((tmp_path / "out" / part / "config.json").read_text()) == {"part": part}
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    assert (tmp_path / "out" / "modules.json").exists()
    assert not (tmp_path / "out" / "plain" / "model.safetensors").exists()


def test_saved_without_modules_json_the_parts_are_still_found(tmp_path):
    told = whole(1)
    merganser.save(told, tmp_path)
    assert digest(Stored(tmp_path)) == digest(told)
    assert digest(open_weights(tmp_path)) == digest(told)
    merganser.save({"only": torch.ones(1)}, tmp_path)
    assert set(Stored(tmp_path)) == {"only"}, "a part of the older model must not stay"
    assert not (tmp_path / "2_Dense" / "model.safetensors").exists()


def test_a_model_without_a_root_and_with_shards_in_a_part(tmp_path):
    told = {f"0_Transformer/layer.{k}.weight": torch.full((10,), float(k)) for k in range(4)}
    told |= {"1_Router/query_0_Static/weight": torch.ones(3)}
    sink = Sink(tmp_path, spec_of(told), shard_size=80)
    for name, tensor in told.items():
        sink.put(name, tensor)
    (sink.staging / "modules.json").touch()
    modules(sink.staging, ["0_Transformer", "1_Router"])
    stored = sink.close()
    assert digest(stored) == digest(told)
    assert (tmp_path / "0_Transformer" / INDEX).exists()
    assert (tmp_path / "0_Transformer" / "model-00001-of-00002.safetensors").exists()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_slash_in_a_name_alone_makes_no_folder(tmp_path):
    told = {"encoder/layer_0/kernel": torch.ones(2), "2_Dense.linear": torch.ones(2), "20/x": torch.zeros(1)}
    assert digest(merganser.save(told, tmp_path)) == digest(told)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_module_list_that_cannot_be_read(tmp_path):
    lay_out(tmp_path, 1)
    for broken in ("{", '{"a": 1}', "[1]"):
        (tmp_path / "modules.json").write_text(broken)
        with pytest.raises(WeightsError, match=r"modules.json: not the list"):
            Stored(tmp_path)
    modules(tmp_path, ["", "../elsewhere", "9_Gone"])
    assert set(Stored(tmp_path)) == set(parts(1)[""])


@pytest.mark.slow
def test_sentence_transformers_loads_what_was_merged(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (tmp_path / "bert").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "day"]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    made = {}
    for name in ("base", "a", "b"):
        BertModel(config).save_pretrained(tmp_path / "bert")
        transformer = models.Transformer(str(tmp_path / "bert"))
        body = [transformer, models.Pooling(8), models.Dense(8, 4)]
        made[name] = st.SentenceTransformer(modules=body, device="cpu")
        made[name].save(str(tmp_path / name))
    merged = merganser.merge(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], "average", into=tmp_path / "out")
    assert "2_Dense/linear.weight" in merged
    loaded = st.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    held, a, b = (model.state_dict() for model in (loaded, made["a"], made["b"]))
    assert held.keys() == a.keys()
    for name, tensor in held.items():
        torch.testing.assert_close(tensor, (a[name] + b[name]) / 2 if tensor.is_floating_point() else a[name])
    assert loaded.encode(["a good day"]).shape == (1, 4)
