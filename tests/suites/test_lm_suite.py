"""The language suite: skills with one answer, splits apart, and everything from pretraining to the report in small."""

import json
from dataclasses import replace

import pytest
import torch

from merganser.check import check_suite
from merganser.errors import DataError
from merganser.suites import gpt, lm
from merganser.suites.skills import SKILLS, copies, pairs, passages

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
