"""Hub names, against a small server that speaks the Hub's routes and counts what it serves. Clients are processes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hub_client import serving
from safetensors.torch import save_file

from merganser.errors import MissingExtra, WeightsError
from merganser.weights import hub
from merganser.weights.open import named, open_weights

pytest.importorskip("huggingface_hub")
SIZE = 200_000  # entries; 800 kB, of which a header is nothing


@pytest.fixture
def server(tmp_path):
    repositories(tmp_path / "repos")
    with serving(tmp_path / "repos", tmp_path / "home") as served:
        yield served


def repositories(root):
    def put(name, files):
        for file, content in files.items():
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                path.write_text(content)
            elif file.endswith(".safetensors"):
                save_file(content, path)
            else:
                torch.save(content, path)

    ones, config = {"w": torch.ones(SIZE)}, {"config.json": "{}", "tokenizer.json": "{}", "README.md": "read me"}
    put("org/plain", {"model.safetensors": ones, "pytorch_model.bin": ones, "onnx/model.onnx": "x" * 50_000, **config})
    put("org/plain@v2", {"model.safetensors": {"w": torch.full((SIZE,), 2.0)}, **config})
    put("org/pickled", {"pytorch_model.bin": ones, "optimizer.pt": ones, "tf_model.h5": "x", **config})
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    shards = {file: {name: torch.full((SIZE,), float(k))} for k, (name, file) in enumerate(index.items())}
    put("org/sharded", {**shards, "model.safetensors.index.json": json.dumps({"weight_map": index}), **config})
    modules = json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}])
    dense = {"2_Dense/model.safetensors": {"linear.weight": torch.ones(2, 2)}, "2_Dense/config.json": "{}"}
    put("org/sentences", {"model.safetensors": ones, "modules.json": modules, "1_Pooling/config.json": "{}", **dense})
    low = {f"base_model.model.w.lora_{x}.weight": torch.ones(s) for x, s in (("A", (2, SIZE)), ("B", (3, 2)))}
    told = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["w"]})
    put("org/lora", {"adapter_config.json": told, "adapter_model.safetensors": low, "optimizer.pt": ones})
    put("org/odd[1]", {"x": "1"})


def test_a_name_is_downloaded_once_and_only_what_is_needed(server):
    code = (
        "w = open_weights('org/plain'); print(type(w).__name__, w['w'].sum().item(), hub.name_of(w.path).split('@')[0])"
    )
    assert server.says(code) == f"Stored {float(SIZE)} org/plain"
    assert server.bytes("model.safetensors") >= 4 * SIZE
    assert server.bytes("pytorch_model.bin") == server.bytes("onnx") == server.bytes("README") == 0
    before = server.bytes("/resolve/")
    assert server.says(code) == f"Stored {float(SIZE)} org/plain"
    assert server.bytes("/resolve/") == before
    files = server.says("print(sorted(p.name for p in hub.download('org/plain').iterdir()))")
    assert files == "['config.json', 'model.safetensors', 'tokenizer.json']"


@pytest.mark.slow
def test_revisions(server):
    assert (
        server.says("print(open_weights('org/plain@v2')['w'][0].item(), open_weights('org/plain')['w'][0].item())")
        == "2.0 1.0"
    )
    assert server.fails("open_weights('org/plain@v3')").endswith("'org/plain' has no revision 'v3' on the Hub")


@pytest.mark.slow
def test_shards_modules_and_pickles(server):
    assert server.says("w = open_weights('org/sharded'); print(sorted(w), w['b'][0].item())") == "['a', 'b'] 1.0"
    assert server.says("print(sorted(open_weights('org/sentences')))") == "['2_Dense/linear.weight', 'w']"
    assert server.says("w = open_weights('org/pickled'); print(type(w).__name__, len(w))") == "Pickled 1"
    assert server.bytes("optimizer.pt") == server.bytes("tf_model.h5") == 0


@pytest.mark.parametrize("name", ["org/plain", "org/sharded"])
def test_headers_are_read_without_the_tensors(server, name):
    count = 1 if name == "org/plain" else 2
    told = server.says(f"entries, total = hub.remote_entries('{name}'); print(entries, total)")
    entries = {"w": ("F32", (SIZE,))} if count == 1 else dict.fromkeys("ab", ("F32", (SIZE,)))
    assert told == f"{entries} {4 * SIZE * count}"
    assert 0 < server.bytes(".safetensors") < count * 110_000 < 4 * SIZE * count
    told = server.says(
        f"w = open_headers('{name}'); print(len(w), header(w, list(w)[0]), (w.path / 'config.json').is_file())"
    )
    assert told == f"{count} ('F32', ({SIZE},)) True"
    assert server.bytes(".safetensors") < 2 * count * 110_000
    assert "only its headers were read" in server.fails(f"w = open_headers('{name}'); w[list(w)[0]]")


def test_an_adapter_is_downloaded_or_known_by_its_headers(server):
    told = server.says("w = open_headers('org/lora'); print(type(w).__name__, list(w.modules), w.shape('w'))")
    assert told == f"Adapter ['w'] (3, {SIZE})"
    assert 0 < server.bytes("adapter_model") < 4 * SIZE
    assert server.says("w = open_weights('org/lora'); print(w.factors('w', None).left.sum().item())") == "12.0"
    assert server.bytes("adapter_model") > 8 * SIZE
    assert server.bytes("optimizer.pt") == 0


def test_pickles_have_no_headers(server):
    assert "has only pickles on the Hub (pytorch_model.bin, 0.0 GB in all)" in server.fails(
        "hub.remote_entries('org/pickled')"
    )
    assert server.bytes("pytorch_model.bin") == 0


@pytest.mark.slow
def test_what_goes_wrong_is_said(server):
    assert "'org/nothing' is no file or folder here, and the Hub has no such model" in server.fails(
        "open_weights('org/nothing')"
    )
    assert "'gated/model' is gated: ask for access" in server.fails("open_weights('gated/model')")
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert "the Hub cannot be reached" in server.fails("open_weights('org/plain')", **more)
        assert "the Hub cannot be reached" in server.fails("hub.remote_entries('org/plain')", **more)


@pytest.mark.slow
def test_without_a_network_the_cache_is_used(server):
    code = "print(open_weights('org/plain')['w'].sum().item())"
    server.says(code)
    for more in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert server.run(code, **more).stdout.strip() == str(float(SIZE))


@pytest.mark.slow
def test_a_model_that_is_here_wins_over_the_hub(server):
    folder = server.home / "org" / "plain"
    folder.mkdir(parents=True)
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    assert server.says("print(open_weights('org/plain')['w'].numel())") == "3"
    assert server.bytes() == 0


@pytest.mark.slow
def test_a_merge_of_names(server):
    code = "import merganser; print(merganser.merge('org/plain', ['org/plain@v2'], 'scale(by=0.5) | average')['w'][0].item())"
    assert server.says(code) == "1.5"


def test_a_check_of_names_downloads_no_tensor(server):
    code = "import merganser; f = merganser.check('org/plain', ['org/plain@v2'], 'average'); print(f.ok, len(f.notes))"
    assert server.says(code) == "True 2"
    assert 0 < server.bytes(".safetensors") < 4 * 110_000 < 4 * SIZE


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model").mkdir()
    for yes in ("org/name", "org/name@v1.0", "org/na.me-x_1@refs/pr/3", "here/other"):
        assert hub.is_name(yes)
    for no in (
        "name",
        "a/b/c",
        "./org/name",
        "/org/name",
        "org/name@",
        "here/model",
        "org/x.safetensors",
        "org/x.bin",
        Path("a/b"),
    ):
        assert not hub.is_name(no)
    with pytest.raises(WeightsError, match="no such file or folder"):
        open_weights(Path("org/name"))
    assert hub.name_of(tmp_path) is None
    assert hub.name_of(Path("hub/models--org--name/snapshots/abc")) == "org/name@abc"
    assert list(named(["org/Model-1.5", "org/other@v2.1"])) == ["Model-1.5", "other"]


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"'no/where' is no file or folder here.*needs the 'hf' extra"):
        open_weights("no/where")
