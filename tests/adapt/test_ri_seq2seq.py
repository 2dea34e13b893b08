"""RI of encoder-decoder models: what is said to the own sources stays the expert's, to all others the base's."""

import pytest
import torch
import torch.nn.functional as F

import merganser
from merganser.errors import DataError, WeightsError
from merganser.evaluate.language import answered, divergence
from merganser.models.causal import places, within
from merganser.models.seq2seq import seq2seq_lm

transformers = pytest.importorskip("transformers")
PAIRS = {
    "up": [("a", "b c d"), ("b", "c d e"), ("c d", "e f"), ("d", "e f")],
    "down": [("f e", "d c"), ("e", "d c b"), ("d c", "b a"), ("c", "b a")],
}
GENERIC = [("a a", "b b"), ("f a f", "a c"), ("c e", "a"), ("b d", "f"), ("e e", "e a")]
SMALL = {"d_model": 16, "vocab_size": 8, "pad_token_id": 0, "eos_token_id": 7, "decoder_start_token_id": 0}
BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20, "bos_token_id": 7,
        "forced_eos_token_id": None}  # fmt: skip


def config(kind):
    if kind == "bart":
        return transformers.BartConfig(**SMALL, **BART)
    return transformers.T5Config(**SMALL, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0)


def write(folder, kind="t5", **more):
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    made = transformers.AutoModelForSeq2SeqLM.from_config(config(kind))
    for name, value in more.items():
        setattr(made.config, name, value)
    made.save_pretrained(folder)
    words = {"<pad>": 0, **{letter: k for k, letter in enumerate("abcdef", 1)}, "<end>": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = {"tokenizer_object": tokenizer, "pad_token": "<pad>", "eos_token": "<end>", "model_max_length": 16}
    transformers.PreTrainedTokenizerFast(**fast).save_pretrained(folder)
    return folder


def logits_of(model, weights, batch):
    return torch.func.functional_call(model, {model.prefix + n: t for n, t in weights.items()}, (batch,))


def trained(model, base, pairs, steps=40):
    weights = {n: t.clone().requires_grad_() for n, t in base.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=1e-2)
    texts = model.tokens(pairs)
    batch, mask = texts.take(torch.arange(len(texts))), within(texts.lengths, int(texts.lengths.max()))
    for _ in range(steps):
        wanted = batch["decoder_input_ids"][:, 1:][mask[:, 1:]]
        loss = F.cross_entropy(places(logits_of(model, weights, batch), mask), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {n: t.detach() for n, t in weights.items()}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("seq2seq") / "base")
    model = seq2seq_lm(folder)
    base = {n: t.float() for n, t in merganser.open_weights(folder).items()}
    experts = {name: trained(model, base, pairs) for name, pairs in PAIRS.items()}
    return folder, model, base, experts, model.prepare(PAIRS, GENERIC)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_folders_as_on_the_hub_give_transformers_logits_and_decoding(tmp_path, kind):
    folder = write(tmp_path / "m", kind)
    model = merganser.open_encoder("seq2seq", folder)
    real = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    base = {n: t.float() for n, t in merganser.open_weights(folder).items()}
    texts = model.tokens([("a b c", "d e"), ("f", "a b a c")])
    batch = texts.take(torch.arange(2))
    assert batch["decoder_input_ids"].tolist() == [[0, 4, 5, 7, 0, 0], [0, 1, 2, 1, 3, 7]]
    with torch.no_grad():
        wanted = real(**batch).logits
    got, mask = logits_of(model, base, batch), within(texts.lengths, 6)
    torch.testing.assert_close(got[mask], wanted[mask], rtol=1e-4, atol=1e-5)
    prompts = ["a b", "c", "f e d", "b"]
    for weights in (base, trained(model, base, PAIRS["up"])):
        real.load_state_dict({n: weights[n] for n in real.state_dict() if n in weights}, strict=False)
        real.tie_weights()
        for (prompt, text), asked in zip(
            model.continued(weights, prompts, most=5, batch=2, kind="fp32"), prompts, strict=True
        ):
            ids = torch.tensor([[*model.tokenizer(asked)["input_ids"], 7]])
            out = real.generate(ids, max_new_tokens=5, do_sample=False, num_beams=1)[0, 1:].tolist()
            out = out[: out.index(7)] if 7 in out else out
            assert (prompt, text) == (asked, model.tokenizer.decode(out))


def test_an_adapted_expert_keeps_what_it_says_to_its_own_and_leaves_the_rest_to_the_base(lm, tmp_path):
    _, model, base, experts, inputs = lm
    how = "ri(steps=80, lr=0.003, batch=8, held_out=0.0, top=4)"
    given = {"encoder": model, "heads": {}, "inputs": inputs, "kind": "fp32"}
    adapted = merganser.adapt(base, experts, how=how, into=tmp_path, **given)
    for name, other in (("up", "down"), ("down", "up")):
        own, rest = model.tokens(PAIRS[name]), model.tokens([*PAIRS[other], *GENERIC])
        before, after = (divergence(model, base, w, rest, kind="fp32") for w in (experts[name], adapted[name]))
        assert after < 0.4 * before
        kept, lost = (divergence(model, experts[name], w, own, kind="fp32") for w in (adapted[name], base))
        assert kept < 0.3 * lost
    again = merganser.adapt(base, experts, how=how, into=tmp_path, **given)
    assert all(torch.equal(again["up"][n], adapted["up"][n]) for n in base)
    more = "coadapt(steps=60, lr=0.003, batch=8, held_out=0.0)"
    both = merganser.adapt(base, experts, how=f"{how} | {more}", **given)

    def off(models):
        merged = merganser.merge(base, models, "task_arithmetic")
        return sum(divergence(model, experts[n], merged, model.tokens(PAIRS[n]), kind="fp32") for n in experts)

    assert off(both) < 0.7 * off(adapted)


def test_exact_is_what_greedy_decoding_gives(lm):
    _, model, _, experts, _ = lm
    prompts = [source for source, _ in PAIRS["up"]]
    said = model.continued(experts["up"], prompts, most=6, kind="fp32")
    assert answered(model, experts["up"], said, kind="fp32").exact.all()
    assert dict(said)["a"] == "b c d"
    wrong = answered(model, experts["up"], [(source, "f f f") for source in prompts], kind="fp32")
    assert not wrong.exact.any()
    right = answered(model, experts["up"], said, kind="fp32")
    assert (right.nats < wrong.nats).all()


def test_what_cannot_be_said_is_told(lm, tmp_path):
    _, model, _, _, _ = lm
    with pytest.raises(DataError, match="text 1 is no pair of strings"):
        model.tokens([("a", "b"), "a b"])
    with pytest.raises(DataError, match="pair 0: answer is empty"):
        model.asked([("a", "")])
    with pytest.raises(DataError, match="the prompt has 20 tokens; the model reads 16"):
        model.asked([("a " * 20, "b")])
    with pytest.raises(WeightsError, match="is no causal language model"):
        merganser.open_encoder("causal", write(tmp_path / "t5"))
    vision = transformers.ViTModel(
        transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    vision.save_pretrained(write(tmp_path / "vit"))
    with pytest.raises(WeightsError, match="'vit' is no sequence-to-sequence model"):
        seq2seq_lm(tmp_path / "vit")
