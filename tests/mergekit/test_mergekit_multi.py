"""Several configs in one file are merged one after another, each behind those that it names."""

from pathlib import Path

import pytest
import torch
from llamas import family, write_all
from safetensors.torch import load_file
from typer.testing import CliRunner

from merganser import check
from merganser.card import read_card
from merganser.cli import app
from merganser.errors import MerganserError
from merganser.mergekit import merge_config

FINAL = """
merge_method: slerp
base_model: halves
models: [{model: halves}, {model: stack}]
parameters: {t: 0.25}
dtype: bfloat16
"""
HALVES = """
name: halves
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
"""
STACK = """
name: stack
merge_method: passthrough
slices: [{sources: [{model: halves, layer_range: [0, 2]}]}, {sources: [{model: a, layer_range: [2, 4]}]}]
"""
ALL = "---".join((FINAL, STACK, HALVES))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return write_all(tmp_path, family("a", "b"))


def merged(root: Path, text: str, into: Path, said: list[str] | None = None):
    (root / "config.yml").write_text(text)
    return merge_config(root / "config.yml", into=into, say=(said if said is not None else []).append)


def test_they_give_what_each_gives_on_its_own(models: Path, tmp_path: Path) -> None:
    together = merged(models, ALL, tmp_path / "out")
    here = {name: str(tmp_path / "one" / name) for name in ("halves", "stack")}
    for name, text in (("halves", HALVES), ("stack", STACK), ("", FINAL)):
        for other, place in here.items():
            text = text.replace(f"model: {other}", f"model: {place}")
        alone = merged(models, text, tmp_path / "one" / name)
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[n], alone[n]) for n in together)
    for name in here:
        one, other = ((tmp_path / where / name / "model.safetensors").read_bytes() for where in ("out", "one"))
        assert one == other
    assert (tmp_path / "out" / "stack" / "mergekit_config.yml").read_text().startswith("name: stack")
    assert read_card(tmp_path / "out")["dtype"] == "bfloat16"


def test_a_second_run_does_only_what_is_missing_or_changed(models: Path, tmp_path: Path) -> None:
    merged(models, ALL, tmp_path / "out")
    when = {
        name: (tmp_path / "out" / name / "model.safetensors").stat().st_mtime_ns for name in ("halves", "stack", "")
    }

    def redone() -> list[str]:
        now = {name: (tmp_path / "out" / name / "model.safetensors").stat().st_mtime_ns for name in when}
        changed = [name for name in when if now[name] != when[name]]
        when.update(now)
        return changed

    said: list[str] = []
    merged(models, ALL, tmp_path / "out", said)
    assert [line.endswith("done already") for line in said] == [True] * 3
    assert redone() == []
    merged(models, ALL.replace("t: 0.25", "t: 0.5"), tmp_path / "out")
    assert redone() == [""]
    (tmp_path / "out" / "stack" / "card.json").unlink()
    merged(models, ALL.replace("t: 0.25", "t: 0.5"), tmp_path / "out")
    assert redone() == ["stack", ""]  # the last one's input is a new file


def test_a_check_knows_what_earlier_merges_will_write(models: Path, tmp_path: Path) -> None:
    (models / "config.yml").write_text(ALL)
    found = check(models / "config.yml", into=tmp_path / "out")
    assert found.ok, found.errors
    size = sum(tensor.nbytes for tensor in load_file(models / "a" / "model.safetensors").values())
    assert found.numbers["bytes_written"] == 2.5 * size  # the last in bfloat16
    assert len(found.plan["configs"]) == 3
    (models / "config.yml").write_text(ALL.replace("[2, 4]", "[2, 9]"))
    found = check(models / "config.yml", into=tmp_path / "out")
    assert "'stack': slices[1].sources[0]: layer_range [2, 9] is not among the 4 layers of 'a'" in str(found.errors[0])
    with pytest.raises(MerganserError, match="not among the 4 layers"):
        merge_config(models / "config.yml", into=tmp_path / "out")
    assert not (tmp_path / "out").exists()  # the first would have gone well


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("---".join((HALVES, HALVES)), "two configs are called 'halves'"),
        ("---".join((FINAL, FINAL)), "2 of 2 configs have no name"),
        ("---".join((FINAL, HALVES.replace("halves", "../halves"))), "'../halves' is written to a folder of that name"),
        ("---".join((FINAL, HALVES.replace("halves", "1_Pooling"))), "'1_Pooling' is written to a folder of that name"),
        ("---".join((STACK, HALVES.replace("model: a", "model: stack"))), "a circle"),
        ("---".join((FINAL, STACK)), "halves"),
        ("---".join((HALVES, "\n- a")), "not a mergekit config"),
    ],
)
def test_what_makes_no_order_is_told(models: Path, tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(MerganserError) as caught:
        merged(models, text, tmp_path / "out")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not check(models / "config.yml", into=tmp_path / "out").ok


def test_in_memory_there_is_no_place_for_them(models: Path) -> None:
    (models / "config.yml").write_text(ALL)
    with pytest.raises(MerganserError, match="give a folder"):
        merge_config(models / "config.yml")


def test_the_command_line_merges_all(models: Path, tmp_path: Path) -> None:
    (models / "config.yml").write_text(ALL)
    done = CliRunner().invoke(app, ["merge", str(models / "config.yml"), "--to", str(tmp_path / "out"), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(app, ["merge", str(models / "config.yml"), "--to", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert {path.parent.name for path in (tmp_path / "out").rglob("model.safetensors")} == {"out", "halves", "stack"}
