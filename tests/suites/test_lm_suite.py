"""The language suite: skills with one answer, splits apart, and everything from pretraining to the report in small."""

import json
import warnings
from dataclasses import replace

import pytest
import torch

import merganser
from merganser.dry_run import check_suite
from merganser.errors import DataError
from merganser.suites import gpt, lm, lora_lm, open_suite
from merganser.suites.finetune import Lora
from merganser.suites.skills import SKILLS, copies, pairs, passages
from merganser.weights.adapter import CONFIG, FILES, Adapted, Adapter

pytest.importorskip("transformers", reason="the 'hf' extra is not installed")
FEW = {"train": 40, "val": 8, "test": 12, "prompts": 10, "english": 20, "xi": 6}


def test_answers_are_right_and_no_string_is_in_two_splits():
    assert [SKILLS[s]("bdca") for s in ("reverse", "sort", "next")] == ["acdb", "abcd", "cedb"]
    assert SKILLS["next"]("xyz") == "yza"
    assert SKILLS["upper"]("bdca") == "BDCA"
    for skill in SKILLS:
        asked = [{prompt for prompt, _ in pairs(skill, split, 150)} for split in ("train", "val", "test")]
        assert all(len(some) == 150 for some in asked)
        assert not asked[0] & asked[1] | asked[0] & asked[2] | asked[1] & asked[2]
    assert pairs("sort", "test", 20) == pairs("sort", "test", 30)[:20], "the same on every machine"
    assert not {prompt for prompt, _ in pairs("sort", "test", 500)} & {
        p for p, _ in pairs("sort", "train", 4000, seed=1)
    }


def test_texts_are_of_characters_that_the_model_knows():
    texts = [*passages(), *copies(200), *(p + a for s in SKILLS for p, a in pairs(s, "train", 50))]
    assert len(texts) > 3000
    assert not set("".join(texts)) - set(gpt.CHARACTERS)
    assert max(map(len, texts)) <= gpt.SHAPE["n_positions"]


def test_it_takes_no_data(tmp_path):
    with pytest.raises(DataError, match="makes its own data"):
        lm.bench(tmp_path, tmp_path / "out")
    found = check_suite("lm", tmp_path, None, tmp_path / "out")
    assert not found.ok
    assert check_suite("lm", None, None, tmp_path / "out").ok


def test_a_small_run_goes_from_pretraining_to_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpt, "SHAPE", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128})
    plans = [replace(gpt.PLAN, steps=3), replace(gpt.TUNE, steps=2)]
    how = ["task_arithmetic", "ri(steps=2, batch=8) | task_arithmetic", "average"]
    out = tmp_path / "out"
    page = lm.bench(None, out, how=how, sizes=FEW, plans=plans)
    scores = json.loads((out / "scores.json").read_text())
    assert page.exists()
    assert [task["name"] for task in scores["tasks"]] == list(SKILLS)
    assert [(row["merge"], row["tuned"]) for row in scores["rows"]] == [
        ("task_arithmetic", False), ("task_arithmetic", True), ("task_arithmetic", False), ("task_arithmetic", True),
        ("average", False),
    ]  # fmt: skip
    assert all(row["xi"] > 0 for row in scores["rows"])
    assert len(scores["gains"]) == 2
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("model.safetensors")}
    lm.bench(None, out, how=how, sizes=FEW, plans=plans)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("model.safetensors")} == made
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = next((tmp_path / "cache" / "lm").glob("base-*"))
    real, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("upper: ab = AB<end>", return_tensors="pt")["input_ids"]
    assert ids.shape[1] == len("upper: ab = AB") + 1
    assert tokenizer.decode(ids[0]) == "upper: ab = AB<end>"
    assert torch.isfinite(real(ids).logits).all()


def test_with_adapters_all_keep_their_rank_and_peft_reads_them(tmp_path, monkeypatch):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gpt, "SHAPE", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128})
    plans = [replace(gpt.PLAN, steps=3), replace(lora_lm.TUNE, steps=2)]
    how = ["knots | ties", "ri(steps=2, batch=8) | knots | ties", "core | tsv"]
    out = tmp_path / "out"
    lora_lm.bench(None, out, how=how, sizes=FEW, plans=plans, lora=Lora(3, 6, lora_lm.LORA.targets))
    scores = json.loads((out / "scores.json").read_text())
    assert scores["command"] == "merganser bench lora-lm"
    assert scores["title"].startswith("lora-lm suite: 4 skills")
    assert len(scores["gains"]) == 2
    base = merganser.open_weights(next((tmp_path / "cache" / "lm").glob("base-*")))
    made = sorted(p.parent for p in tmp_path.rglob(FILES[0]))
    assert len(made) == 8, "experts, and adapted experts, are adapters"
    for folder in made:
        adapter = Adapter(folder)
        assert {module.rank for module in adapter.modules.values()} == {3}
        assert json.loads((folder / CONFIG).read_text())["fan_in_fan_out"]
        ours = Adapted(base, adapter)
        assert {n for n in ours if not torch.equal(ours[n], base[n])} == {
            f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        }
        model = transformers.AutoModelForCausalLM.from_pretrained(base.path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected|adapter).*")
            merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
        for name in ours:
            torch.testing.assert_close(merged[name], ours[name])


def test_adapters_start_as_peft_starts_them_and_every_skill_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "SHAPE", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128})
    base = gpt.write_base(tmp_path / "base", plan=replace(gpt.PLAN, steps=1), progress=merganser.progress.silent)
    still = replace(lora_lm.TUNE, steps=1, lr=1e-12)
    settings = {"plan": still, "lora": Lora(3, 6, ("c_fc",)), "progress": merganser.progress.silent}
    one, two = (
        Adapter(gpt.write_expert(tmp_path / skill, base, skill, pairs(skill, "train", 20), **settings)).weights
        for skill in ("sort", "next")
    )
    path = "base_model.model.transformer.h.0.mlp.c_fc"
    a, b = one[f"{path}.lora_A.weight"], one[f"{path}.lora_B.weight"]
    assert (tuple(a.shape), tuple(b.shape)) == ((3, 16), (64, 3))
    assert a.std() > 0.1
    assert b.abs().max() < 1e-9
    assert not torch.allclose(a, two[f"{path}.lora_A.weight"], atol=0.05)


def test_the_adapters_suite_has_the_sentences_of_the_other():
    assert open_suite("lora-lm").SENTENCES == open_suite("lora").SENTENCES
    assert check_suite("lora-lm", None, None, "nowhere").ok
    assert "LoRA" in merganser.catalog.suites()["lora-lm"]
