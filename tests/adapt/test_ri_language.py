"""RI of language models: own prompts keep the expert's next tokens, all other texts the base's; folders as on the Hub."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import merganser
from merganser.errors import DataError, HeadError, RecipeError, WeightsError
from merganser.evaluate.language import answered, divergence
from merganser.models.causal import causal_lm, places
from merganser.steps.adapt.coadapt import coadapt
from merganser.steps.adapt.ri import ri
from merganser.steps.tokens import ByKind, NextTokens, top_tokens, with_tail

transformers = pytest.importorskip("transformers")
WORDS = {"up": ["a b c d", "b c d e", "c d e f"], "down": ["f e d", "e d c b", "d c b a"]}
GENERIC = ["a a b b", "f a f a c", "c e a", "b d f", "e e e a", "d f b c"]
SHORT = {"steps": 30, "lr": 3e-3, "batch": 8, "held_out": 0.0, "_precision": "fp32"}


def config(kind):
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=8, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=7, eos_token_id=7
        )
    return transformers.LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, bos_token_id=7, eos_token_id=7,
    )  # fmt: skip


def write(folder, kind="gpt2", seed=0):
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config(kind))
    made.save_pretrained(folder)
    words = {"<pad>": 0, **{letter: k for k, letter in enumerate("abcdef", 1)}, "<end>": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", model_max_length=16
    )
    fast.save_pretrained(folder)
    return folder


def trained(model, base, texts, steps=25):
    weights = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in base.items()}
    optimiser = torch.optim.Adam(weights.values(), lr=1e-2)
    batch = model.tokens(texts).take(torch.arange(len(texts)))
    for _ in range(steps):
        logits = torch.func.functional_call(model, {model.prefix + n: t for n, t in weights.items()}, (batch,))
        wanted = batch["input_ids"][:, 1:][batch["attention_mask"][:, 1:].bool()]
        loss = F.cross_entropy(places(logits, batch["attention_mask"]), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {n: t.detach() for n, t in weights.items()}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """Base, two experts that were moved a little towards their own prompts, and the inputs."""
    folder = write(tmp_path_factory.mktemp("lm") / "base")
    model = causal_lm(folder)
    base = {n: t.float() for n, t in merganser.open_weights(folder).items()}
    inputs = model.prepare(WORDS, GENERIC)
    experts = {name: trained(model, base, texts) for name, texts in WORDS.items()}
    return folder, model, base, experts, inputs


def log_probs(model, weights, inputs, at):
    batch = inputs.take(at)
    with torch.no_grad():
        logits = torch.func.functional_call(model, {model.prefix + n: t for n, t in weights.items()}, (batch,))
    return places(logits, batch["attention_mask"]).log_softmax(-1)


def kl(model, target, weights, inputs, at):
    p, q = (log_probs(model, w, inputs, at) for w in (target, weights))
    return F.kl_div(q, p, log_target=True, reduction="batchmean").item()


def terms(lm, k, expert="up"):
    _, model, base, experts, inputs = lm
    from merganser.models.inputs import Subset

    mine = top_tokens(model, experts[expert], Subset(inputs, inputs.of(expert)), k, kind="fp32")
    theirs = top_tokens(model, base, inputs, k, kind="fp32")
    return NextTokens(inputs, expert, alpha=2.0, distance="kl", wanted=ByKind(inputs, {expert: mine}, theirs))


def test_with_all_tokens_kept_the_loss_is_the_kl_written_naively(lm):
    _, model, base, experts, inputs = lm
    other = {n: t + 0.05 * torch.randn_like(t) for n, t in experts["up"].items()}
    at = torch.tensor([0, 5, 8, 2, 11])
    logits = torch.func.functional_call(model, {model.prefix + n: t for n, t in other.items()}, (inputs.take(at),))
    loss, told = terms(lm, 8)(at, logits.detach())
    own, rest = at[inputs.kinds[at] == 0], at[inputs.kinds[at] != 0]
    assert told["own"].item() == pytest.approx(kl(model, experts["up"], other, inputs, own), rel=2e-2, abs=1e-4)
    assert told["others"].item() == pytest.approx(kl(model, base, other, inputs, rest), rel=2e-2, abs=1e-4)
    assert loss.item() == pytest.approx(told["own"].item() + 2 * told["others"].item(), rel=1e-5)
    fewer = terms(lm, 3)(at, logits.detach())[1]
    assert fewer["own"] < told["own"] + 1e-4, "lumping tokens together cannot raise a KL"
    assert fewer["own"] > 0
    zero = terms(lm, 3)(own, log_full(model, experts["up"], inputs, own))[1]
    assert zero["own"].item() == pytest.approx(0, abs=1e-4)
    assert zero["others"] == 0


def log_full(model, weights, inputs, at):
    with torch.no_grad():
        return torch.func.functional_call(model, {model.prefix + n: t for n, t in weights.items()}, (inputs.take(at),))


def test_a_tail_is_what_is_left():
    log_p = torch.tensor([[0.5, 0.25], [0.9, 0.1]]).log()
    whole = with_tail(log_p).exp()
    assert torch.allclose(whole[0], torch.tensor([0.5, 0.25, 0.25]))
    assert whole[1, 2] < 1e-6


def test_targets_on_disk_are_those_in_memory_and_made_once(lm, tmp_path, monkeypatch):
    _, model, base, _, inputs = lm
    memory = top_tokens(model, base, inputs, 4, kind="fp32")
    disk = top_tokens(model, base, inputs, 4, kind="fp32", folder=tmp_path / "t", key="a")
    assert np.array_equal(memory.values, disk.values)
    assert np.array_equal(memory.ids, disk.ids)
    assert memory.values.nbytes + memory.ids.nbytes == 6 * 4 * int(memory.starts[-1])
    with monkeypatch.context() as patched:
        patched.setattr(torch.func, "functional_call", lambda *_: pytest.fail("computed again"))
        again = top_tokens(model, base, inputs, 4, kind="fp32", folder=tmp_path / "t", key="a")
    assert isinstance(again.values, np.memmap)
    rows = torch.tensor([3, 0])
    assert torch.equal(again.at(rows)[0], memory.at(rows)[0])
    (tmp_path / "t" / "card.json").unlink()  # as a killed run leaves it
    np.save(tmp_path / "t" / "values.npy", np.zeros((2, 4), np.float16))
    healed = top_tokens(model, base, inputs, 4, kind="fp32", folder=tmp_path / "t", key="a")
    assert np.array_equal(healed.values, memory.values)


def test_an_adapted_expert_keeps_its_prompts_and_leaves_the_rest_to_the_base(lm, tmp_path):
    _, model, base, experts, inputs = lm
    how = "ri(steps=60, lr=0.003, batch=8, held_out=0.0, top=4)"
    adapted = merganser.adapt(
        base, experts, encoder=model, heads={}, inputs=inputs, how=how, kind="fp32", into=tmp_path
    )
    for name, expert in experts.items():
        own, rest = inputs.of(name), (inputs.kinds != inputs.names.index(name)).nonzero()[:, 0]
        before, after = (kl(model, base, w, inputs, rest) for w in (expert, adapted[name]))
        assert after < 0.4 * before
        assert kl(model, expert, adapted[name], inputs, own) < 0.3 * kl(model, expert, base, inputs, own)
    assert json.loads((tmp_path / "up" / "card.json").read_text())["sentence"].startswith("ri(")
    again = merganser.adapt(base, experts, encoder=model, heads={}, inputs=inputs, how=how, kind="fp32", into=tmp_path)
    assert all(torch.equal(again["up"][n], adapted["up"][n]) for n in base)
    alone = ri(experts["up"], base, {}, inputs, own="up", encoder=model, steps=60, lr=0.003, batch=8, held_out=0.0,
               top=4, _precision="fp32")  # fmt: skip
    assert all(torch.equal(alone[n], adapted["up"][n]) for n in base)
    merged = merganser.merge(base, adapted, "task_arithmetic")
    plain = merganser.merge(base, experts, "task_arithmetic")
    off = [sum(kl(model, experts[n], w, inputs, inputs.of(n)) for n in experts) for w in (plain, merged)]
    assert off[1] < off[0], "merging disturbs adapted experts less"


def test_co_adapted_experts_say_their_own_in_a_merge(lm, tmp_path):
    _, model, base, experts, inputs = lm
    how = "ri(steps=60, lr=0.003, batch=8, held_out=0.0)"
    more = "coadapt(steps=60, lr=0.003, batch=8, held_out=0.0, low=0.6, high=1.0)"
    given = {"encoder": model, "heads": {}, "inputs": inputs, "kind": "fp32"}
    alone = merganser.adapt(base, experts, how=how, **given)
    both = merganser.adapt(base, experts, how=f"{how} | {more}", into=tmp_path, **given)
    generic = (inputs.kinds < 0).nonzero()[:, 0]

    def off(adapted):
        merged = merganser.merge(base, adapted, "task_arithmetic | scale(by=0.8)")
        own = sum(kl(model, experts[n], merged, inputs, inputs.of(n)) for n in experts)
        return own + kl(model, base, merged, inputs, generic)

    assert off(both) < 0.6 * off(alone)
    others = {"down": experts["down"]}
    with pytest.raises(HeadError, match="'third' has no prompts"):
        coadapt(experts["up"], base, {}, inputs, own="third", encoder=model, others=others)
    with pytest.raises(ValueError, match="about heads"):
        coadapt(experts["up"], base, {}, inputs, own="up", encoder=model, others=others, temperature=2.0)


def test_targets_by_kind_are_those_of_each_model(lm):
    _, model, base, experts, inputs = lm
    from merganser.models.inputs import Subset

    tables = {n: top_tokens(model, w, Subset(inputs, inputs.of(n)), 8, kind="fp32") for n, w in experts.items()}
    wanted = ByKind(inputs, tables, top_tokens(model, base, inputs, 8, kind="fp32"))
    at = torch.tensor([4, 9, 1, 5])
    values, ids = wanted.at(at)
    start = 0
    for i in at.tolist():
        kind = int(inputs.kinds[i])
        right = log_probs(model, base if kind < 0 else experts[inputs.names[kind]], inputs, torch.tensor([i]))
        rows = slice(start, start := start + len(right))
        torch.testing.assert_close(right.gather(1, ids[rows]), values[rows], rtol=2e-3, atol=2e-3)
    assert start == len(values)


def test_exact_is_what_greedy_decoding_gives(lm):
    folder, model, base, experts, _ = lm
    real = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ends = trained(model, base, [f"{text} <end>" for text in WORDS["up"]], steps=80)
    seen = set()
    for weights in (base, experts["up"], experts["down"], ends):
        real.load_state_dict({n: weights[n] for n in real.state_dict() if n in weights}, strict=False)
        real.tie_weights()
        for prompt in ("a", "b c", "f e", "d", "c d"):
            ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
            out = real.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
            ended, said = 7 in out, model.tokenizer.decode([t for t in out if t != 7])
            if not said or "<" in said:
                continue
            found = answered(model, weights, [(prompt, said), (prompt, f"{said} a")], kind="fp32")
            assert found.exact.tolist() == [ended, False] or not ended, (prompt, said)
            seen.add(bool(found.exact[0]))
            wanted = torch.tensor([*model.tokenizer(said)["input_ids"], 7])
            logits = real(torch.cat([ids, wanted[None]], dim=1)).logits
            nats = F.cross_entropy(logits[0, -len(wanted) - 1 : -1], wanted).item()
            assert found.nats[0] == pytest.approx(nats, rel=1e-4)
    assert seen == {True, False}


def test_continued_is_greedy_decoding_and_divergence_the_kl(lm):
    folder, model, base, experts, inputs = lm
    real = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ends = trained(model, base, [f"{text} <end>" for text in WORDS["up"]], steps=80)
    prompts = ["a", "b c", "f e", "d", "c d", "b"]
    stopped = 0
    for weights in (base, experts["down"], ends):
        real.load_state_dict({n: weights[n] for n in real.state_dict() if n in weights}, strict=False)
        real.tie_weights()
        said = model.continued(weights, prompts, most=5, batch=2, kind="fp32")
        for prompt, text in zip(prompts, said, strict=True):
            ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
            out = real.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
            assert text.startswith(prompt)
            assert text[len(prompt) :].replace(" ", "") == model.tokenizer.decode(out).replace(" ", "")
            stopped += text.endswith("<end>")
    assert stopped
    own = inputs.of("up")
    mine = model.tokens(WORDS["up"])
    expected = kl(model, experts["up"], base, inputs, own)
    assert divergence(model, experts["up"], base, mine, kind="fp32") == pytest.approx(expected, rel=1e-4)


def test_sampled_texts_follow_the_models_own_distribution(lm):
    _, model, base, _, _ = lm
    first = torch.tensor([[7]])
    logits = torch.func.functional_call(
        model, {model.prefix + n: t for n, t in base.items()},
        ({"input_ids": first, "attention_mask": torch.ones_like(first)},),
    )  # fmt: skip
    for temperature in (1.0, 0.5):
        texts = model.sampled(base, 1500, most=4, temperature=temperature, batch=100, kind="fp32")
        assert len(texts) == 1500
        assert texts == model.sampled(base, 1500, most=4, temperature=temperature, batch=100, kind="fp32")
        # of texts that say anything: those that end at once are drawn again
        p = (logits[0, -1] / temperature).softmax(0)[[1, 2, 3, 4, 5, 6]]
        seen = torch.tensor([sum(t.split()[0] == letter for t in texts) for letter in "abcdef"])
        wanted = p / p.sum() * seen.sum()
        assert ((seen - wanted).square() / wanted).sum() < 20.5, "chi-square of 5 degrees of freedom at 0.001"
    assert texts != model.sampled(base, 1500, most=4, temperature=0.5, batch=100, seed=1, kind="fp32")
    inputs = model.prepare({"up": WORDS["up"], "down": WORDS["down"]}, texts[:20])
    assert int((inputs.kinds == -1).sum()) == 20
    with pytest.raises(ValueError, match="temperature"):
        model.sampled(base, 2, temperature=0)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_folders_as_on_the_hub_load_and_give_transformers_logits(tmp_path, kind):
    folder = write(tmp_path / "m", kind)
    model = causal_lm(folder)
    real = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    batch = model.tokens(["a b c", "f e"]).take(torch.arange(2))
    weights = merganser.open_weights(folder)
    ours = torch.func.functional_call(model, {model.prefix + n: weights[n] for n in weights}, (batch,))
    theirs = real(**batch).logits
    seen = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-4, atol=1e-5)
    assert model.tokens(["a " * 40]).lengths.tolist() == [16], "cut to what the model reads"


def test_what_cannot_be_adapted_is_told(lm, tmp_path):
    folder, model, base, experts, inputs = lm
    with pytest.raises(DataError, match="expert 'up' has no prompts"):
        model.prepare({"up": [], "down": ["a b"]})
    with pytest.raises(DataError, match="at least two kinds"):
        model.prepare({"up": ["a b"]})
    with pytest.raises(DataError, match="nothing to predict"):
        model.prepare({"up": ["a"], "down": ["a b"]})
    with pytest.raises(HeadError, match="'third' has no prompts"):
        merganser.adapt(base, {"third": experts["up"]}, encoder=model, heads={}, inputs=inputs)
    with pytest.raises(ValueError, match="about heads"):
        ri(experts["up"], base, {}, inputs, own="up", encoder=model, temperature=2.0)
    with pytest.raises(HeadError, match="no head of that name"):
        merganser.adapt(base, experts, encoder=model, heads={}, inputs=inputs, how="distac")
    with pytest.raises(RecipeError, match="has no option 'lenght'"):
        merganser.open_encoder("causal", folder, lenght=4)
    with pytest.raises(DataError, match="reads 16"):
        answered(model, base, [("a " * 12, "b " * 8)])


def test_another_kind_of_model_is_no_language_model(lm, tmp_path):
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    vision = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**small, image_size=8, patch_size=4))
    vision.save_pretrained(tmp_path)
    lm[1].tokenizer.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="is no causal language model"):
        causal_lm(tmp_path)
