"""Data sets of the Hub as unlabeled inputs, against a small server that speaks its routes and counts what it serves."""

import io
import json

import pytest
from hub_client import serving

from merganser.errors import DataError
from merganser.evaluate.hub_data import MOST, DataSet, known_data, training_files

pytest.importorskip("huggingface_hub")
pyarrow = pytest.importorskip("pyarrow")


def parquet(**columns):
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def png(shade):
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new("RGB", (8, 8), (shade, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def server(tmp_path):
    def put(name, **files):
        for file, content in files.items():
            path = tmp_path / "repos" / "datasets" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    shards = {
        f"data/train-0000{k}-of-00002.parquet": parquet(text=[f"shard {k}", f"row {k}"], label=[0, 1]) for k in (0, 1)
    }
    put("org/texts", **shards, **{"data/test-00000-of-00001.parquet": parquet(text=["never"]), "README.md": b"read me"})
    put("org/texts@v2", **{"train.jsonl": json.dumps({"body": "of version two"}).encode()})
    put("org/many", **{f"{c}/train-0.parquet": parquet(text=[c], other=["x"]) for c in ("de", "en")})
    put("org/drawn", **{f"images/{k}.png": png(k) for k in range(3)})
    put("org/held", **{"data/train.parquet": parquet(image=[{"bytes": png(7), "path": "7.png"}])})
    put("org/csv", **{"train.csv": b"a,b"})
    with serving(tmp_path / "repos", tmp_path / "home") as served:
        yield served


READ = "from merganser.evaluate.unlabeled import *; print(list(read_unlabeled(['{}'])))"


def test_the_training_split_is_fetched_once_and_nothing_else(server):
    code = READ.format("hub:org/texts")
    assert server.says(code) == "['shard 0', 'row 0', 'shard 1', 'row 1']"
    assert server.bytes("train-") > 0
    assert server.bytes("/test-") == server.bytes("README") == 0
    before = server.bytes("/resolve/")
    assert server.says(code) == "['shard 0', 'row 0', 'shard 1', 'row 1']"
    assert server.bytes("/resolve/") == before
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert server.run(code, **more).stdout.strip() == "['shard 0', 'row 0', 'shard 1', 'row 1']"


def test_a_revision_a_file_a_configuration_and_a_column(server):
    assert server.says(READ.format("hub:org/texts@v2")) == "['of version two']"
    assert server.says(READ.format("hub:org/texts/data/test-00000-of-00001.parquet")) == "['never']"
    assert server.says(READ.format("hub:org/many/en")) == "['en']"
    assert server.says(READ.format("hub:org/many/en#other")) == "['x']"


def test_pictures_as_files_and_in_columns(server):
    code = "from merganser.evaluate.unlabeled import *; print([p.getpixel((0, 0))[0] for p in read_unlabeled(['{}'])])"
    assert server.says(code.format("hub:org/drawn")) == "[0, 1, 2]"
    assert server.says(code.format("hub:org/held")) == "[7]"


def test_a_check_fetches_nothing(server):
    code = "from merganser.evaluate.unlabeled import *; print(check_unlabeled('hub:org/texts#text') > 100)"
    assert server.says(code) == "True"
    assert server.bytes("/resolve/") == 0
    assert server.fails(code.replace("org/texts", "org/nothing")).endswith(
        "data set 'org/nothing': the Hub has no such data set (if it is private: `hf auth login`)"
    )


def test_what_goes_wrong_is_said(server):
    def says(source):
        return server.fails(READ.format(source))

    assert "hub:org/many: has several configurations (de, en); name one: hub:org/many/en" in says("hub:org/many")
    assert "try the Hub's own copy in parquet, hub:org/csv@refs/convert/parquet" in says("hub:org/csv")
    assert "hub:org/texts: has no folder or file 'fr'" in says("hub:org/texts/fr")
    assert "'org/texts' has no revision 'v9' on the Hub" in says("hub:org/texts@v9")
    offline = server.fails(READ.format("hub:org/texts"), HF_HUB_OFFLINE="1")
    assert "data set 'org/texts': the Hub cannot be reached" in offline


def test_which_files_are_the_training_split():
    def chosen(*files, under=None, size=1):
        return training_files(dict.fromkeys(files, size), DataSet("o/n", None, under))

    assert chosen("train/0.tar", "test/0.tar", "notes.txt") == ["train/0.tar"]
    assert chosen("default/train/0000.parquet", "default/validation/0000.parquet") == ["default/train/0000.parquet"]
    assert chosen("trainers.parquet", "dev.parquet") == ["trainers.parquet"], "a word that only begins like a split"
    assert chosen("dev.parquet") == ["dev.parquet"]
    assert chosen("LICENSE.txt", "train.txt", "test.txt") == ["train.txt"]
    with pytest.raises(DataError, match=r"no \.parquet"):
        chosen("LICENSE.txt", "drawing.png", "train.csv")
    assert chosen("LICENSE.txt", "a.txt", under="a.txt") == ["a.txt"]
    assert chosen("a/1.jpg", "b/2.JPG") == ["a/1.jpg", "b/2.JPG"], "folders of pictures are classes"
    with pytest.raises(DataError, match=r"several configurations \(data/de, data/en\)"):
        chosen("data/de/train-0.parquet", "data/en/train-0.parquet")
    large = [f"train-{k}.parquet" for k in range(3)]
    with pytest.raises(DataError, match=r"hub:o/n: 6 GB in 3 files; name one: hub:o/n/train-0.parquet"):
        chosen(*large, size=MOST / 2)
    assert chosen(*large, under="train-1.parquet", size=2 * MOST) == ["train-1.parquet"]


def test_how_they_are_written():
    assert known_data("hub:org/name@v1/de/train.parquet") == DataSet("org/name", "v1", "de/train.parquet")
    assert known_data("hub:org/name@refs/convert/parquet/en/") == DataSet("org/name", "refs/convert/parquet", "en")
    for wrong in ("hub:", "hub:name", "hub:org/", "hub:org/name@"):
        with pytest.raises(DataError, match="names no data set; write hub:org/name"):
            known_data(wrong)
