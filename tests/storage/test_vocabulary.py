"""Models whose vocabularies differ: every token keeps its embedding, whatever its row was."""

import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import merganser
from merganser.errors import WeightsError
from merganser.weights.header import header
from merganser.weights.match import check_match, match
from merganser.weights.open import open_weights
from merganser.weights.save import carry
from merganser.weights.tokenizer import read_tokenizer
from merganser.weights.vocabulary import match_vocabularies, vocabulary

WORDS = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "far"]
WIDTH = 4


def tokenizer_json(words, added=(), first=None):
    """Return a tokenizer.json of whole words; added tokens come after them."""
    entries = [
        {"id": words.index(t) if t in words else len(words) + k, "content": t, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": t.startswith(("[", "<"))}
        for k, t in enumerate(added)
    ]  # fmt: skip
    vocab = {word: row for row, word in enumerate(words)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": entries, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip


def folder(path, words, added=(), *, rows=None, seed=0, config=None, offset=0.0, extra=None):
    """Write a model of an embedding, an output layer with a bias, and a body; a token's row tells the token."""
    path.mkdir(parents=True)
    tokens = {w: r for r, w in enumerate([*words, *(a for a in added if a not in words)])}
    rows = rows or len(tokens)
    rng = torch.Generator().manual_seed(seed)
    weights = {
        "embed.weight": torch.randn(rows, WIDTH, generator=rng) + offset,
        "head.weight": torch.randn(rows, WIDTH, generator=rng) + offset,
        "head.bias": torch.randn(rows, generator=rng) + offset,
        "body.weight": torch.randn(WIDTH, WIDTH, generator=rng),
        **(extra or {}),
    }
    save_file(weights, path / "model.safetensors")
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json(words, added)))
    (path / "config.json").write_text(
        json.dumps({"vocab_size": rows, "eos_token_id": tokens.get("[EOS]"), **(config or {})})
    )
    return tokens, weights


TABLES = ("embed.weight", "head.weight", "head.bias")


@pytest.fixture
def three(tmp_path):
    """A base, and two experts with tokens of their own, one of them common."""
    base = folder(tmp_path / "base", WORDS, seed=0)
    one = folder(tmp_path / "one", WORDS, ["<a>", "<both>"], seed=1)
    two = folder(tmp_path / "two", WORDS, ["<both>", "<c>", "<d>"], seed=2)
    return tmp_path, {"base": base, "one": one, "two": two}


def opened(root, *names):
    weights = {name: open_weights(root / name) for name in names}
    return weights.pop("base"), weights


# which token is which row


def test_vocabularies_are_read_from_what_tokenizers_leave(tmp_path):
    def put(name, content):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    with pytest.raises(WeightsError, match="no tokenizer"):
        vocabulary(tmp_path)
    put("vocab.txt", "[PAD]\n\u2028\nthe\n##s\n")
    assert vocabulary(tmp_path) == {"[PAD]": 0, "\u2028": 1, "the": 2, "##s": 3}
    put("vocab.json", {"a": 0, "b": 1})
    put("added_tokens.json", {"<x>": 2})
    assert vocabulary(tmp_path) == {"a": 0, "b": 1, "<x>": 2}
    assert read_tokenizer(str(tmp_path)) == ({"a": 0, "b": 1}, {"<x>": 2})
    added = [{"id": 3, "content": "<y>"}, {"id": 0, "content": "p"}]
    put(
        "tokenizer.json",
        {"added_tokens": added, "model": {"type": "Unigram", "vocab": [["p", -1.0], ["q", -2.5], ["r", 0]]}},
    )
    assert vocabulary(tmp_path) == {"p": 0, "q": 1, "r": 2, "<y>": 3}
    put("tokenizer.json", "{broken")
    with pytest.raises(WeightsError, match="not a tokenizer file that can be read"):
        vocabulary(tmp_path)


def test_a_tokenizer_of_sentencepiece_alone_is_asked_through_transformers(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    asked = []

    class Told:
        def get_vocab(self):
            return {"a": 0, "b": 1, "<x>": 2}

        def get_added_vocab(self):
            return {"<x>": 2}

    class Auto:
        @staticmethod
        def from_pretrained(path, **settings):
            asked.append(settings)
            return Told()

    monkeypatch.setattr(transformers, "AutoTokenizer", Auto)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert vocabulary(tmp_path) == {"a": 0, "b": 1, "<x>": 2}
    assert asked == [{"local_files_only": True, "trust_remote_code": False}]


# matching


def test_a_difference_is_refused_with_its_remedy(three):
    root, _ = three
    base, experts = opened(root, *three[1])
    with pytest.raises(WeightsError) as error:
        check_match(base, experts)
    text = str(error.value)
    assert "the vocabularies differ ('embed.weight' and 2 more tensors" in text or "more tensors" in text
    for part in (
        "[14, 4] in the base",
        "[16, 4] in 'one'",
        "[17, 4] in 'two'",
        "--vocabulary (vocabulary=) base, union or the name",
    ):
        assert part in text, text
    with pytest.raises(WeightsError, match=r"no vocabulary 'onne' \(did you mean 'one'\?\)"):
        match_vocabularies(base, experts, "onne")


def expected(told, target, size):
    """Return by token what base and experts must have, straight from the definition."""
    base_tokens, base = told["base"]
    experts = {k: v for k, v in told.items() if k != "base"}
    zero, views = {}, {name: {} for name in experts}
    for table in TABLES:
        rows = torch.zeros(size, *base[table].shape[1:])
        for token, row in target.items():
            having = [w[table][t[token]] for t, w in experts.values() if token in t]
            rows[row] = base[table][base_tokens[token]] if token in base_tokens else torch.stack(having).mean(0)
        zero[table] = rows
        for name, (tokens, weights) in experts.items():
            views[name][table] = rows.clone()
            for token, row in target.items():
                if token in tokens:
                    views[name][table][row] = weights[table][tokens[token]]
    return zero, views


@pytest.mark.parametrize("choice", ["base", "union", "one", "two"])
def test_every_row_is_its_tokens(three, choice):
    root, told = three
    base, experts = opened(root, *told)
    zero, views, writer = match_vocabularies(base, experts, choice)
    union = {**told["base"][0], **{t: 14 + k for k, t in enumerate(("<a>", "<both>", "<c>", "<d>"))}}
    target = union if choice == "union" else told[choice][0]
    wants, each = expected(told, target, len(target))
    for table in TABLES:
        assert torch.equal(zero[table], wants[table])
        assert header(zero, table) == ("F32", tuple(wants[table].shape))
        for name, view in views.items():
            assert torch.equal(view[table], each[name][table]), (name, table)
            assert header(view, table) == header(zero, table)
    for view in (zero, *views.values()):
        assert list(view) == list(base)
    assert torch.equal(views["one"]["body.weight"], told["one"][1]["body.weight"])
    assert (writer is None) == (choice == "base")


@pytest.mark.parametrize("choice", ["base", "two"])
def test_as_many_rows_but_other_tokens(tmp_path, choice):
    moved = [*WORDS[:4], *reversed(WORDS[4:])]
    told = {"base": folder(tmp_path / "base", WORDS), "two": folder(tmp_path / "two", moved, seed=2)}
    base, experts = opened(tmp_path, *told)
    with pytest.raises(WeightsError, match=r"the vocabularies differ .* as large, but other tokens in 'two'"):
        check_match(base, experts)
    found = match(base, experts, vocabulary=choice)
    wants, each = expected(told, told[choice][0], len(WORDS))
    for table in TABLES:
        assert torch.equal(found.base[table], wants[table])
        assert torch.equal(found.experts["two"][table], each["two"][table])
    assert check_match(base, experts, own=["embed.*", "head.*"]) == ["body.weight"]


def test_the_same_tokens_written_otherwise_are_no_difference(tmp_path):
    folder(tmp_path / "base", WORDS)
    folder(tmp_path / "one", WORDS, seed=1)
    (tmp_path / "one" / "tokenizer.json").write_text(json.dumps(tokenizer_json(WORDS), indent=4))
    folder(tmp_path / "bare", WORDS, seed=2)
    (tmp_path / "bare" / "tokenizer.json").unlink()
    folder(tmp_path / "beyond", WORDS, ["<no row>"], rows=len(WORDS), seed=3)
    base, experts = opened(tmp_path, "base", "one", "bare", "beyond")
    for choice in (None, "base", "union", "bare"):
        zero, views, writer = match_vocabularies(base, experts, choice)
        assert zero is base
        assert views == experts
        assert writer is None


def test_weights_in_memory_say_where_their_tokenizers_are(three):
    root, told = three
    base, experts = told["base"][1], {"one": told["one"][1]}
    with pytest.raises(WeightsError, match=r"has other shapes: 'embed.weight' \[16, 4\] instead of \[14, 4\]"):
        match(base, experts)
    found = match(base, experts, vocabulary="union", sources={"base": root / "base", "one": root / "one"})
    assert found.experts["one"]["embed.weight"].shape == (16, 4)


def test_another_tensor_of_that_many_rows_is_left_alone(tmp_path):
    """A matrix whose rows are as many as the base's tokens has that many in every model: it is no embedding."""
    table = {"mlp.weight": torch.randn(len(WORDS), 3)}
    folder(tmp_path / "base", WORDS, extra=table)
    folder(tmp_path / "one", WORDS, ["<a>"], seed=1, extra=table)
    base, experts = opened(tmp_path, "base", "one")
    zero, views, _ = match_vocabularies(base, experts, "union")
    assert zero["mlp.weight"].shape == views["one"]["mlp.weight"].shape == (len(WORDS), 3)
    assert zero["embed.weight"].shape == (len(WORDS) + 1, WIDTH)


def test_sizes_that_do_not_tell_tensors_apart_are_an_error(tmp_path):
    moved = [*WORDS[:4], *reversed(WORDS[4:])]
    config = {"max_position_embeddings": len(WORDS)}
    folder(tmp_path / "base", WORDS, config=config)
    folder(tmp_path / "one", moved, seed=1, config=config)
    base, experts = opened(tmp_path, "base", "one")
    with pytest.raises(WeightsError, match="vocab_size = max_position_embeddings = 14"):
        match(base, experts, vocabulary="base")


def test_an_expert_without_a_tokenizer_and_with_other_rows(three):
    root, _ = three
    (root / "two" / "tokenizer.json").unlink()
    base, experts = opened(root, "base", "one", "two")
    with pytest.raises(WeightsError, match="expert 'two' has 17 embedding rows instead of 14, and no tokenizer"):
        match(base, experts, vocabulary="union")


def test_a_tokenizer_trained_anew_has_no_union(tmp_path):
    folder(tmp_path / "base", WORDS)
    folder(tmp_path / "one", [*WORDS, "penguin", "auk"], seed=1)
    base, experts = opened(tmp_path, "base", "one")
    with pytest.raises(WeightsError, match="expert 'one' has 2 tokens, 'penguin' first, that are pieces of its own"):
        match(base, experts, vocabulary="union")
    assert match(base, experts, vocabulary="one").base["embed.weight"].shape == (16, WIDTH)


# padding


@pytest.mark.parametrize(("choice", "rows"), [("base", 16), ("one", 17), ("union", 24)])
def test_padding_is_the_bases_and_a_union_grows_to_the_same_multiple(tmp_path, choice, rows):
    told = {
        "base": folder(tmp_path / "base", WORDS, rows=24 if choice == "union" else 16),
        "one": folder(tmp_path / "one", WORDS, ["<a>", "<b>"], rows=17, seed=1),
    }
    base, experts = opened(tmp_path, *told)
    zero, views, _ = match_vocabularies(base, experts, choice)
    origin, expert = told["base"][1]["embed.weight"], told["one"][1]["embed.weight"]
    table, view = zero["embed.weight"], views["one"]["embed.weight"]
    assert len(table) == len(view) == rows
    if choice == "base":  # rows 14 and 15 belong to no token of the base's
        assert torch.equal(table, origin)
        assert torch.equal(view[14:], origin[14:])
    elif choice == "one":
        assert torch.equal(table[14:16], expert[14:16]), "tokens that only the expert has"
        assert torch.equal(view, expert)
        assert torch.equal(table[16], expert[16]), "padding that the base does not have"
    else:
        assert torch.equal(table[14:16], expert[14:16]), "two tokens take rows of padding"
        assert torch.equal(table[16:], origin[16:])
        assert torch.equal(view[16:], origin[16:])


def test_a_union_beyond_the_padding(tmp_path):
    told = {
        "base": folder(tmp_path / "base", WORDS, rows=16),
        "one": folder(tmp_path / "one", WORDS, ["<a>", "<b>", "<c>"], seed=1),
    }
    base, experts = opened(tmp_path, *told)
    zero, views, _ = match_vocabularies(base, experts, "union")
    assert len(zero["embed.weight"]) == 32, "16 is divided by 16, and so is 32"
    assert torch.equal(zero["embed.weight"][14:17], told["one"][1]["embed.weight"][14:])
    assert torch.equal(zero["embed.weight"][17:], told["base"][1]["embed.weight"][15:].expand(15, -1))
    assert torch.equal(views["one"]["embed.weight"][17:], zero["embed.weight"][17:])


# precision and memory


def test_an_expert_that_lacks_a_token_adds_nothing_to_it(tmp_path):
    base_tokens, weights = folder(tmp_path / "base", WORDS, ["<a>", "<b>"])
    save_file({n: t.bfloat16() for n, t in weights.items()}, tmp_path / "base" / "model.safetensors")
    _, weights = folder(tmp_path / "one", WORDS, seed=1)
    save_file({n: t.half() for n, t in weights.items()}, tmp_path / "one" / "model.safetensors")
    base, experts = opened(tmp_path, "base", "one")
    zero, views, _ = match_vocabularies(base, experts, "base")
    assert header(views["one"], "embed.weight") == ("F32", (16, WIDTH))
    assert views["one"]["embed.weight"].dtype == torch.float32
    assert header(zero, "embed.weight")[0] == "BF16"
    for token in ("<a>", "<b>"):
        row = base_tokens[token]
        assert not (views["one"]["embed.weight"][row] - zero["embed.weight"][row].float()).any()


def test_views_hold_no_more_than_the_tensor_that_is_touched(tmp_path):
    class Living(TorchDispatchMode):
        """Counts the bytes of tensors made and not yet dropped."""

        alive = peak = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            inside = isinstance(out, torch.Tensor) and (func.is_view or any(out is a for a in args))
            if isinstance(out, torch.Tensor) and not inside:
                Living.alive += out.nbytes
                Living.peak = max(Living.peak, Living.alive)
                weakref.finalize(out, self.drop, out.nbytes)
            return out

        @staticmethod
        def drop(size):
            Living.alive -= size

    words = [*WORDS, *(f"w{k}" for k in range(20_000))]
    folder(tmp_path / "base", words)
    for k in range(4):
        folder(tmp_path / f"e{k}", words, [f"<{k}>"], seed=k)
    base, experts = opened(tmp_path, "base", *(f"e{k}" for k in range(4)))
    zero, views, _ = match_vocabularies(base, experts, "union")
    one = 4 * WIDTH * (len(words) + 4)
    with Living():
        for view in (zero, *views.values()):
            for table in TABLES:
                view[table]
        gc.collect()
        assert Living.alive < one / 10
    index = 8 * (len(words) + 4)  # where each row comes from
    assert one <= Living.peak < 1.2 * one + 3 * index


# the tokenizer of the result


@pytest.fixture(params=["llama", "bert"])
def real(request, tmp_path):
    """A tiny model of a real library, and two experts with tokens added and embeddings resized."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    raw = tmp_path / "tokenizer.json"
    raw.write_text(json.dumps(tokenizer_json(WORDS, ["[PAD]", "[UNK]", "[BOS]", "[EOS]"])))
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 12,
    }

    def tokenizer():
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(raw), **special)

    if request.param == "llama":
        config = transformers.LlamaConfig(
            **sizes, num_key_value_heads=2, bos_token_id=2, eos_token_id=3, pad_token_id=0
        )
        base = transformers.LlamaForCausalLM(config)
    else:
        base = transformers.BertForMaskedLM(
            transformers.BertConfig(**sizes, max_position_embeddings=20, pad_token_id=0)
        )
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    for name, added in {"one": ["<a>", "<both>"], "two": ["<both>", "<c>", "<d>"]}.items():
        model = type(base).from_pretrained(tmp_path / "base")
        words = tokenizer()
        words.add_tokens(added, special_tokens=name == "two")
        model.resize_token_embeddings(len(words))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter) * 0.1
        model.save_pretrained(tmp_path / name)
        words.save_pretrained(tmp_path / name)
    return transformers, type(base), tmp_path


@pytest.mark.parametrize("choice", ["base", "union", "one", "two"])
def test_the_result_loads_with_its_library_and_every_token_has_its_embedding(real, choice):
    transformers, kind, root = real
    merganser.merge(root / "base", [root / "one", root / "two"], "average", vocabulary=choice, into=root / "out")
    model = kind.from_pretrained(root / "out")
    words = transformers.AutoTokenizer.from_pretrained(root / "out")
    each = {
        n: (kind.from_pretrained(root / n), transformers.AutoTokenizer.from_pretrained(root / n))
        for n in ("base", "one", "two")
    }
    union = {t for _, t in each.values() for t in t.get_vocab()}
    assert set(words.get_vocab()) == (union if choice == "union" else set(each[choice][1].get_vocab()))
    rows = model.get_input_embeddings().weight
    assert len(rows) == model.config.vocab_size == len(words)
    for token, row in words.get_vocab().items():
        mine = {n: (m.get_input_embeddings().weight, t.get_vocab().get(token)) for n, (m, t) in each.items()}
        having = [table[r] for n, (table, r) in mine.items() if n != "base" and r is not None]
        zero = mine["base"][0][mine["base"][1]] if mine["base"][1] is not None else torch.stack(having).mean(0)
        wants = zero + sum(h - zero for h in having) / 2
        torch.testing.assert_close(rows[row], wants, rtol=0, atol=1e-6)
    text = "the cat sat <a> <both> <c> dog"
    told = words.convert_ids_to_tokens(words(text, add_special_tokens=False)["input_ids"])
    kept = set(words.get_vocab())
    assert told == [t for t in told if t in kept]
    assert [t for t in ("<a>", "<both>", "<c>") if t in kept] == [t for t in told if t.startswith("<")]
    assert words.eos_token_id == words.get_vocab()["[EOS]"]
    with torch.no_grad():
        assert torch.isfinite(
            model(**words("the cat <both>", return_tensors="pt", return_token_type_ids=False)).logits
        ).all()


def test_special_tokens_follow_their_tokens(tmp_path):
    moved = ["<new>", *WORDS]
    for name, words in {"base": WORDS, "one": moved}.items():
        folder(tmp_path / name, words, seed=1, config={"pad_token_id": 0, "text_config": {"bos_token_id": 2}})
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2], "top_k": 3}))
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    del config["pad_token_id"], config["text_config"]
    (tmp_path / "one" / "config.json").write_text(json.dumps(config))
    (tmp_path / "one" / "generation_config.json").unlink()
    (tmp_path / "base" / "vocab.txt").write_text("stale")
    *_, writer = match_vocabularies(*opened(tmp_path, "base", "one"), "one")
    carry(tmp_path / "base", tmp_path / "out")
    writer(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told == {"vocab_size": 15, "eos_token_id": 4, "pad_token_id": 1, "text_config": {"bos_token_id": 3}}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [4, 3], "top_k": 3}
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert vocabulary(tmp_path / "out") == vocabulary(tmp_path / "one")


def test_a_delta_is_not_stored_where_the_base_has_other_rows(three):
    root, _ = three
    with pytest.raises(WeightsError, match="other rows than the base's, so a delta could not be added to it"):
        merganser.merge(root / "base", [root / "one"], "average", vocabulary="union", stored="delta", into=root / "d")
    assert not (root / "d").exists()
    merganser.merge(root / "base", [root / "one"], "average", vocabulary="base", stored="delta", into=root / "d")
