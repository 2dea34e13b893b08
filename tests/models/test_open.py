"""One door to encoders, and one clear error for each wrong thing."""

import sys

import pytest
import torch

from merganser.errors import RecipeError
from merganser.models.hf import ImageEncoder, TextEncoder
from merganser.models.open import open_encoder

FILE = """
import torch
from dataclasses import dataclass

@dataclass
class Options:
    width: int

def small(base, *, width=3):
    made = torch.nn.Linear(2, Options(width).width)
    made.base = base
    return made

def nothing(base):
    return 3

number = 7
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    return "./mine.py"


def test_kinds(write):
    text = open_encoder("text", write("bert", "BertModel")[0], pooling="cls", length=9)
    assert isinstance(text, TextEncoder)
    assert (text.pooling, text.length) == ("cls", 9)
    assert isinstance(open_encoder("image", write("vit", "ViTModel")[0]), ImageEncoder)


def test_a_function_in_a_file_or_a_module(file, tmp_path, monkeypatch):
    made = open_encoder(f"{file}:small", "some/base", width=5)
    assert isinstance(made, torch.nn.Linear)
    assert made.out_features == 5
    assert made.base == "some/base"
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert open_encoder("mine:small", "b").out_features == 3


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("txt", {}, "unknown kind of encoder 'txt' (did you mean 'text'?)"),
        ("./mine.py", {}, "./file.py:function"),
        ("./other.py:small", {}, "./other.py does not exist"),
        ("./mine.py:smal", {}, "has no 'smal' (did you mean 'small'?)"),
        ("./mine.py:number", {}, "'number' is a int, not a function"),
        ("./mine.py:nothing", {}, "returned a int; it must return a torch.nn.Module"),
        ("./mine.py:small", {"widht": 3}, "no option 'widht' (did you mean 'width'?)"),
        ("text", {"poolin": "cls"}, "no option 'poolin' (did you mean 'pooling'?)"),
        ("no_such_module_here:small", {}, "fails on import: ModuleNotFoundError"),
        ("./broken.py:small", {}, "fails on import: ZeroDivisionError"),
    ],
)
def test_errors(file, tmp_path, kind, options, message):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(RecipeError) as caught:
        open_encoder(kind, "base", **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
