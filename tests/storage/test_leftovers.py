"""What an older merge put beside its weights goes with it; what others put there stays."""

import json

import pytest
import torch

import merganser
from merganser.card import read_card
from merganser.weights.settle import CARDS


def model(folder, files):
    weights = {"x.weight": torch.randn(4, 4)}
    merganser.save(weights, folder)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return weights


@pytest.fixture
def bases(tmp_path):
    sentence = {"modules.json": "[]", "1_Pooling/config.json": "{}", "config.json": '{"a": 1}', "tokenizer.json": "{}"}
    model(tmp_path / "sentence", sentence)
    model(tmp_path / "plain", {"config.json": '{"a": 2}', "vocab.txt": "x"})
    return tmp_path / "sentence", tmp_path / "plain"


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_files_of_the_older_merge_go_and_all_others_stay(bases, tmp_path):
    sentence, plain = bases
    out = tmp_path / "out"
    merganser.merge(sentence, [sentence], "average", into=out)
    assert read_card(out)["files"] == ["1_Pooling/config.json", "config.json", "modules.json", "tokenizer.json"]
    (out / "notes.txt").write_text("mine")
    merganser.merge(plain, [plain], "average", into=out)
    assert files(out) == sorted(["model.safetensors", "config.json", "vocab.txt", "notes.txt", *CARDS])
    assert not (out / "1_Pooling").exists()
    assert json.loads((out / "config.json").read_text()) == {"a": 2}


def test_a_folder_in_which_something_else_lies_stays(bases, tmp_path):
    sentence, plain = bases
    out = tmp_path / "out"
    merganser.merge(sentence, [sentence], "average", into=out)
    (out / "1_Pooling" / "mine.txt").write_text("mine")
    merganser.merge(plain, [plain], "average", into=out)
    assert files(out / "1_Pooling") == ["mine.txt"]


def test_a_card_cannot_have_other_files_removed(bases, tmp_path):
    sentence, plain = bases
    out = tmp_path / "out"
    merganser.merge(sentence, [sentence], "average", into=out)
    (tmp_path / "precious").write_text("x")
    (out / "link").symlink_to(tmp_path / "precious")
    card = json.loads((out / "card.json").read_text())
    card["files"] = ["../precious", str(tmp_path / "precious"), "link", 7]
    (out / "card.json").write_text(json.dumps(card))
    merganser.merge(plain, [plain], "average", into=out)
    assert (tmp_path / "precious").read_text() == "x"
    assert (out / "link").is_symlink()


def test_a_broken_card_of_an_older_merge_does_not_matter(bases, tmp_path):
    sentence, plain = bases
    for text in ("", "[]", '{"files": 3}', "nonsense"):
        merganser.merge(sentence, [sentence], "average", into=tmp_path / "out")
        (tmp_path / "out" / "card.json").write_text(text)
        merganser.merge(plain, [plain], "average", into=tmp_path / "out")


def test_parts_in_the_folder_of_another_merge_are_told(bases, tmp_path):
    sentence, _ = bases
    merganser.merge(sentence, [sentence], "average", into=tmp_path / "out", part=(1, 2))
    found = merganser.check(sentence, [sentence], "average", into=tmp_path / "out")
    assert any("holds parts of another merge (part-00001-of-00002)" in str(one) for one in found.warnings)
    with pytest.warns(UserWarning, match="join them first, or delete them"):
        merganser.merge(sentence, [sentence], "average", into=tmp_path / "out")
    assert (tmp_path / "out" / "part-00001-of-00002").is_dir()
