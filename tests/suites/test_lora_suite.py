"""The LoRA suite: its experts are adapters that PEFT would load, made once; adapting and merging keep their factors."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_text_suite import needs_data, needs_minilm, piece
from typer.testing import CliRunner

import merganser
from merganser.card import read_card
from merganser.catalog import suites
from merganser.cli import app
from merganser.sentence import parse
from merganser.suites import lora, open_suite
from merganser.suites.suite import bench, shortened
from merganser.weights.adapter import CONFIG, FILES, Adapted, Adapter, is_adapter

WORDS = [f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")]
WORDS += ["a", "the", "of", "cat", "dog", "bird", "car", "red", "blue", "green", "runs", "sits", "bad", "good", "film"]
HOW = ["knots | ties", "ri(steps=4, batch=16, lr=0.0005) | knots | ties", "core | tsv", "dare(keep=0.2) | ties"]


def random_bert(folder: Path) -> Path:
    """Write a BERT of two tiny layers with random weights and a tokenizer of a few words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, vocab_size=len(WORDS), max_position_embeddings=20)
    transformers.BertModel(config).save_pretrained(folder)  # with a pooler, which the suite's encoder does not have
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 20, **names})
    )
    return folder


def toy_tasks(folder: Path) -> Path:
    """Write two tasks of drawn sentences: which animal, which colour; and unlabeled sentences."""
    rng = torch.Generator().manual_seed(0)

    def sentence() -> list[str]:
        return [WORDS[5 + int(k)] for k in torch.randint(len(WORDS) - 5, (6,), generator=rng)]

    for name, classes in (("animal", ["cat", "dog", "bird"]), ("colour", ["red", "blue", "green"])):
        (folder / name).mkdir(parents=True)
        told = f'name = "{name}"\nkind = "text"\nclasses = {json.dumps(classes)}\ntemplate = "a {{}}"\n'
        (folder / name / "task.toml").write_text(told + 'metric = "accuracy"\n')
        for split, rows in (("train", 60), ("val", 20), ("test", 30)):
            lines = [json.dumps({"text": " ".join([classes[k % 3], *sentence()]), "label": k % 3}) for k in range(rows)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "aux").mkdir()
    (folder / "aux" / "some.txt").write_text("\n".join(" ".join(sentence()) for _ in range(80)))
    return folder


def run_twice(short, data: Path, tmp_path: Path, how: list[str]) -> dict:
    """Run a suite twice; the second run must find all done. Return its scores."""
    bench(short, data, tmp_path / "out", how=how)
    experts = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob(FILES[0])}
    assert len(experts) == 2
    bench(short, data, tmp_path / "out", how=how)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob(FILES[0])} == experts
    assert all(stage["reused"] for stage in json.loads((tmp_path / "out" / "run.json").read_text())["stages"])
    adapted = [p.parent for p in (tmp_path / "out" / "adapted").rglob(FILES[0])]
    assert len(adapted) == 2, "adapted experts are adapters again"
    for folder in (*adapted, *(p.parent for p in experts)):
        assert is_adapter(folder)
        assert {m.rank for m in Adapter(folder).modules.values()} == {short.lora.rank}
    return json.loads((tmp_path / "out" / "scores.json").read_text())


def judge_what_was_written(out: Path, scores: dict) -> None:
    """The merged folder that a run leaves has more tensors than the encoder; `eval` and `diagnose` take it all the same."""
    recipe, merged = out / "recipe.toml", out / "merged"
    assert "pooler.dense.weight" in merganser.open_weights(merged)
    done = CliRunner().invoke(app, ["eval", str(recipe), str(merged), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)[str(merged)]
    best = next(row for row in scores["rows"] if row["sentence"] == read_card(merged)["sentence"])
    assert told["mean"]["score"] == pytest.approx(best["mean"]["score"])
    recipe.write_text(recipe.read_text().replace("diagnose = ", "diagnose = 0  # "))
    done = CliRunner().invoke(app, ["diagnose", str(recipe), str(merged), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["sums"][str(merged)] > 0


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    base = random_bert(tmp_path / "tiny")
    settings = {
        "base": lambda: base,
        "steps": 8,
        "scales": [0.5, 1.0],
        "lora": lora.Lora(4, 8, lora.SUITE.lora.targets),
    }
    return shortened(lora.SUITE, **settings), toy_tasks(tmp_path / "data"), base


def test_adapters_of_a_random_bert_from_tasks_to_report(tiny, tmp_path):
    short, data, base = tiny
    scores = run_twice(short, data, tmp_path, HOW)
    assert [row["merge"] for row in scores["rows"] if not row["tuned"]] == [
        "knots | ties", "knots | ties", "core | tsv", "dare(keep=0.2) | ties"
    ]  # fmt: skip
    judge_what_was_written(tmp_path / "out", scores)
    folder = next(p.parent for p in (tmp_path / "cache").rglob(FILES[0]) if p.parent.name == "animal")
    config, card = json.loads((folder / CONFIG).read_text()), read_card(folder)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["base_model_name_or_path"] == base.name
    assert str(tmp_path) not in (folder / CONFIG).read_text()
    assert card["kind"] == "expert"
    assert card["lora"]["rank"] == 4
    theta = merganser.open_weights(base)
    changed = {n for n in theta if not torch.equal(Adapted(theta, Adapter(folder))[n], theta[n])}
    wanted = ("self.query", "self.key", "self.value", "output.dense")
    assert changed == {f"encoder.layer.{k}.attention.{w}.weight" for k in range(2) for w in wanted}


def test_experts_are_the_same_bytes_when_made_again(tiny, tmp_path, monkeypatch):
    short, data, _ = tiny
    made = []
    for cache in ("one", "two"):
        monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / cache))
        bench(short, data, tmp_path / "out", experts_only=True)
        made.append({p.parent.name: load_file(p) for p in (tmp_path / cache).rglob(FILES[0])})
    assert made[0].keys() == {"animal", "colour"}
    assert all(torch.equal(made[0][e][n], made[1][e][n]) for e in made[0] for n in made[0][e])
    first = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
    assert not torch.allclose(made[0]["animal"][first], made[0]["colour"][first], atol=0.05), "their own random A"


def test_peft_loads_an_expert_to_the_same_weights(tiny, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    short, data, base = tiny
    bench(short, data, tmp_path / "out", experts_only=True)
    for file in (tmp_path / "cache").rglob(FILES[0]):
        model = transformers.BertModel.from_pretrained(base)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "error", message=".*(missing|unexpected|adapter).*"
            )  # it warns where an adapter's keys are not the model's
            merged = peft.PeftModel.from_pretrained(model, file.parent).merge_and_unload().state_dict()
        ours = Adapted(merganser.open_weights(base), Adapter(file.parent))
        for name in ours:
            torch.testing.assert_close(merged[name], ours[name])


@needs_data
@needs_minilm
def test_a_small_piece_of_the_real_tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    short = shortened(lora.SUITE, steps=10, scales=[0.5, 1.0])
    scores = run_twice(short, piece(tmp_path / "data"), tmp_path, HOW[1:2])
    assert scores["experts"]["mean"]["score"] > scores["base"]["mean"]["score"]
    import transformers

    model = transformers.AutoModel.from_pretrained(tmp_path / "out" / "merged", local_files_only=True)
    assert model.config.hidden_size == 384


def test_every_merger_is_there_plain_and_aligned_with_and_without_adapting():
    sentences = [str(parse(text)) for text in lora.SENTENCES]
    assert len(set(sentences)) == len(sentences) == 2 * (5 + 5 + 3)
    for how in lora.PLAIN:
        assert {how, f"knots | {how}", f"ri(lr=0.0005) | {how}", f"ri(lr=0.0005) | knots | {how}"} <= set(sentences)
    assert [s for s in sentences if s.startswith("core")] == ["core | ties", "core | tsv", "core | iso_c"]
    assert "LoRA" in suites()["lora"]
    assert open_suite("lora").SUITE.lora.rank == 16
