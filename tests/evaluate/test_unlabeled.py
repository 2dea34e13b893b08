"""Unlabeled inputs from files of every kind, and what is said where they are not what their names say."""

import gzip
import json

import numpy as np
import pytest

from merganser.errors import DataError
from merganser.evaluate.pictures import Pictures
from merganser.evaluate.unlabeled import check_unlabeled, is_no_path, read_unlabeled


def test_unlabeled_inputs(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt.gz"
    one.write_text("\n".join(f"one {k}" for k in range(100)) + "\n\n")
    with gzip.open(two, "wt") as file:
        file.write("\n".join(f"two {k}" for k in range(4)))
    assert len(read_unlabeled([one, two])) == 104
    some = read_unlabeled([one, two], limit=20)
    assert sum(t.startswith("one") for t in some) == 10
    assert some[0] == "one 0"
    assert some[9] == "one 99", "a share is spread over the whole file"
    np.savez(tmp_path / "x.npz", x=np.zeros((5, 2, 2, 1), np.uint8))
    assert read_unlabeled([tmp_path / "x.npz"], 3).shape == (3, 2, 2, 1)
    np.savez(tmp_path / "y.npz", x=np.ones((5, 3, 3, 3), np.uint8))
    mixed = read_unlabeled([tmp_path / "x.npz", tmp_path / "y.npz"], 4)
    assert [one.shape for one in mixed] == [(2, 2, 1), (2, 2, 1), (3, 3, 3), (3, 3, 3)]
    for name, content, match in (
        ("empty.txt", b"\n \n", "is empty"),
        ("binary.txt", b"\xff\xfe\x00\x01", "not UTF-8 text"),
        ("nul.txt", b"a\x00b", "NUL bytes"),
        ("bad.txt.gz", b"not gzip", "not UTF-8 text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=match):
            read_unlabeled([tmp_path / name])
    with pytest.raises(DataError, match="no such file"):
        read_unlabeled([tmp_path / "gone.txt"])
    with pytest.raises(DataError, match="mix texts and images"):
        read_unlabeled([one, tmp_path / "x.npz"])


def lines(path, *rows):
    data = "\n".join(map(json.dumps, rows)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parquet(path, **columns):
    pyarrow, written = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    written.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_texts_are_a_column(tmp_path, kind):
    def file(name, *rows):
        place = tmp_path / f"{name}.{kind}"
        if kind != "parquet":
            return lines(place, *rows)
        return parquet(place, **{c: [row.get(c) for row in rows] for c in dict.fromkeys(c for r in rows for c in r)})

    text = file("text", {"text": "one ", "title": "t"}, {"text": None, "title": "t"}, {"text": " \n", "title": "t"})
    assert read_unlabeled([text]) == ["one"], "rows without text are none"
    assert read_unlabeled([f"{text}#title"]) == ["t", "t", "t"]
    only = file("only", {"label": 1, "body": "two\nlines"}, {"label": 2, "body": "three"})
    assert read_unlabeled([text, only]) == ["one", "two\nlines", "three"]
    two = file("two", {"a": "x", "b": "y", "n": 3})
    with pytest.raises(DataError, match=rf"which column are the texts\? Write two.{kind}#a \(or b\)"):
        read_unlabeled([two])
    with pytest.raises(DataError, match=r"no column of texts 'bb' \(did you mean 'b'\?\); it has a, b"):
        read_unlabeled([f"{two}#bb"])
    with pytest.raises(DataError, match=r"no column of texts or pictures \(it has n\)"):
        read_unlabeled([file("none", {"n": 1})])


def test_pictures_are_a_column_of_a_parquet(tmp_path):
    file = parquet(tmp_path / "x.parquet", img=[{"bytes": b"1", "path": "1.png"}] * 3, caption=["a", "b", "c"])
    found = read_unlabeled([file], 2)
    assert isinstance(found, Pictures)
    assert found.encoded == [b"1", b"1"]
    assert read_unlabeled([f"{file}#caption"]) == ["a", "b", "c"]
    (tmp_path / "no.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match="not a parquet file"):
        read_unlabeled([tmp_path / "no.parquet"])


def test_a_number_sign_may_be_part_of_a_name(tmp_path):
    odd = tmp_path / "issue#7.txt"
    odd.write_text("one")
    assert read_unlabeled([odd]) == ["one"]
    with pytest.raises(DataError, match="a file of this kind has no columns"):
        read_unlabeled([f"{odd}#text"])


def test_a_check_reads_nothing(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    assert check_unlabeled(f"{tmp_path / 'x.parquet'}#text") == 10
    assert check_unlabeled("noise:3") == 0
    for wrong, said in (("gone.txt", "no such file"), ("nois:3", "unknown source"), ("hub:org", "names no data set")):
        with pytest.raises(DataError, match=said):
            check_unlabeled(wrong)
    assert is_no_path("hub:org/name")
    assert is_no_path("noise:3")
    assert not is_no_path("hub/name")
