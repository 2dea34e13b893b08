"""The published benchmarks on local folders in the layouts that models and data sets have on the Hub, with a tiny CLIP."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from merganser.cli import app
from merganser.errors import DataError, WeightsError
from merganser.evaluate.pictures import Pictures, read_pictures, split_files
from merganser.evaluate.task import read_task
from merganser.evaluate.unlabeled import read_unlabeled
from merganser.suites import SUITES, clip, domainnet, open_suite, published

Image = pytest.importorskip("PIL.Image", reason="the 'demo' extra is not installed")
pytest.importorskip("pyarrow", reason="the 'hf' extra is not installed")
TWO = ["average", "ri(steps=2, batch=8, lr=0.0001) | tsv"]
ARGS = [f"--how={how}" for how in TWO]


def picture(k: int) -> bytes:
    rng = np.random.default_rng(k)
    pixels = rng.integers(0, 255, (20 + k % 3, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def parquet(path, classes, n, names=("image", "label"), start=0):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {names[0]: [{"bytes": picture(start + k), "path": None} for k in range(n)]}
    rows[names[1]] = [(start + k) % classes for k in range(n)]
    pyarrow.parquet.write_table(pyarrow.table(rows), path)


def webdataset(path, classes, n):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for k in range(n):
            for name, data in ((f"s{k:04}.jpg", picture(k)), (f"s{k:04}.cls", str(k % classes).encode())):
                told = tarfile.TarInfo(name)
                told.size = len(data)
                archive.addfile(told, io.BytesIO(data))


def folders(root, names, n):
    for k in range(n):
        place = root / names[k % len(names)]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{k}.png").write_bytes(picture(k))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return 20 data sets in the layouts they have on the Hub."""
    root = tmp_path_factory.mktemp("data")
    for name, told in clip.facts().items():
        place, n = root / told["dataset"], len(told["classes"])
        if name == "FER2013":
            webdataset(place / "train" / "0.tar", n, 20)
            webdataset(place / "test" / "0.tar", n, 6)
        elif name == "RenderedSST2":
            folders(place / "train", ["negative", "positive"], 20)
            folders(place / "test", ["negative", "positive"], 6)
        else:
            inside = "cropped_digits" if name == "SVHN" else "data"
            test = "validation" if name == "Food101" else "test"
            names = ("img", "fine_label") if name == "CIFAR100" else ("image", "label")
            parquet(place / inside / "train-00000-of-00002.parquet", n, 12, names)
            parquet(place / inside / "train-00001-of-00002.parquet", n, 8, names, start=12)
            parquet(place / inside / f"{test}-00000-of-00001.parquet", n, 6, names)
    folders(root / "aux" / "pictures", ["some"], 30)
    return root


def as_openclip(weights):
    """Return Hugging Face's vision tower under open_clip's names, q, k and v in one matrix."""
    out = {}
    for name, tensor in weights.items():
        if name == "visual_projection.weight":
            out["model.visual.proj"] = tensor.T.contiguous()
        if not name.startswith("vision_model.") or "position_ids" in name or "k_proj" in name or "v_proj" in name:
            continue
        stem, kind = name.removeprefix("vision_model.").rsplit(".", 1)
        if stem.endswith("q_proj"):
            fused = torch.cat([weights[name.replace("q_proj", f"{c}_proj")] for c in "qkv"])
            layer = stem.split(".")[2]
            out[f"model.visual.transformer.resblocks.{layer}.attn.in_proj_{kind}"] = fused
            continue
        stem = stem.replace("encoder.layers", "transformer.resblocks").replace("layer_norm", "ln_")
        stem = stem.replace("self_attn", "attn").replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        stem = stem.replace("pre_layrnorm", "ln_pre").replace("post_layernorm", "ln_post")
        plain = {"embeddings.patch_embedding": "conv1", "embeddings.position_embedding": "positional_embedding"}
        if stem == "embeddings":
            out["model.visual.class_embedding"] = tensor
        elif stem == "embeddings.position_embedding":
            out["model.visual.positional_embedding"] = tensor
        else:
            out[f"model.visual.{plain.get(stem, stem)}.{kind}"] = tensor
    return {**out, "model.logit_scale": weights["logit_scale"], "model.ln_final.weight": torch.ones(3)}


@pytest.fixture(scope="module")
def models(write, tmp_path_factory):
    """Return a folder with a base and experts of both families, tiny, where the published ones would lie."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("models")
    made, _ = write("clip", "CLIPModel")
    base = root / "openai" / "clip-vit-base-patch32"
    base.parent.mkdir()
    base.symlink_to(made)
    whole = load_file(made / "model.safetensors")
    vision = {n: t for n, t in whole.items() if n.startswith("vision_model.")}
    for k, (name, told) in enumerate(clip.facts().items()):
        rng = torch.Generator().manual_seed(k)
        moved = {n: t + 0.02 * torch.randn(t.shape, generator=rng) for n, t in vision.items() if t.is_floating_point()}
        expert = root / "tanganke" / f"clip-vit-base-patch32_{told['expert']}"
        expert.mkdir(parents=True)
        save_file(moved, expert / "model.safetensors", {"format": "pt"})
        tall = root / "ViT-B-32" / f"{name}Val"
        tall.mkdir(parents=True)
        torch.save(as_openclip({**whole, **moved}), tall / "nonlinear_finetuned.pt")
        torch.save(as_openclip(whole), tall / "nonlinear_zeroshot.pt")
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGANSER_CACHE", str(tmp_path / "cache"))


def test_an_open_clip_checkpoint_gives_the_features_of_the_same_model_on_the_hub(models, batch_of):
    from merganser.models.encoder import call
    from merganser.models.hf import image_encoder
    from merganser.models.openclip import openclip_encoder
    from merganser.models.split import encoder_weights
    from merganser.weights.open import open_weights

    hub, tall = models / "openai" / "clip-vit-base-patch32", models / "ViT-B-32" / "CarsVal"
    plain, fused = image_encoder(hub), openclip_encoder(tall / "nonlinear_zeroshot.pt", clip=hub)
    images = np.random.default_rng(0).integers(0, 255, (5, 24, 24, 3)).astype(np.uint8)
    x = batch_of(plain, images)
    with torch.no_grad():
        assert torch.allclose(fused(x), plain(x), atol=1e-6)
    expert = dict(encoder_weights(open_weights(tall / "nonlinear_finetuned.pt"), fused))
    assert "model.visual.transformer.resblocks.0.attn.in_proj_weight" in expert, (
        "merged as it lies: q, k and v together"
    )
    assert not any("ln_final" in name or "logit_scale" in name for name in expert)
    params = {name: tensor.clone().requires_grad_() for name, tensor in expert.items()}
    moved = call(fused, params, x)
    assert not torch.allclose(moved, plain(x), atol=1e-3)
    moved.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in params.values()), "every tensor is trained"


def test_an_open_clip_checkpoint_of_another_size_is_refused(models, tmp_path):
    from merganser.models.openclip import openclip_encoder

    held = torch.load(models / "ViT-B-32" / "CarsVal" / "nonlinear_zeroshot.pt", weights_only=True)
    hub = models / "openai" / "clip-vit-base-patch32"
    odd = {**held, "model.visual.conv1.weight": torch.zeros(3, 3)}
    less = {name: tensor for name, tensor in held.items() if name != "model.visual.ln_post.bias"}
    for weights in (odd, less):
        torch.save(weights, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match="another size"):
            openclip_encoder(tmp_path / "x.pt", clip=hub)
    torch.save({"a.weight": torch.zeros(2)}, tmp_path / "y.pt")
    with pytest.raises(WeightsError, match="not an open_clip checkpoint"):
        openclip_encoder(tmp_path / "y.pt", clip=hub)


@pytest.mark.parametrize(
    ("name", "family"),
    [pytest.param("clip-20", "tall-masks", marks=pytest.mark.slow), ("clip-8", "fusionbench")],
)
def test_the_whole_run_with_the_published_numbers_beside_it(name, family, models, data, tmp_path, cache):
    to = tmp_path / "out"
    more = ["--family", family, "--models", str(models), "--data", str(data), "--to", str(to), "--json"]
    done = CliRunner().invoke(app, ["bench", name, *ARGS, *more])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    scores = json.loads((to / "scores.json").read_text())
    assert [task["name"] for task in scores["tasks"]] == open_suite(name, family=family).NAMES
    known = published.tables()[family]
    rows = {(row["row"], row["scale"]): row for row in told["published"]["rows"]}
    base = rows["base", ""]
    assert base["published"] == known["base"]["ViT-B/32"][0 if name == "clip-8" else 2]
    assert base["difference"] == pytest.approx(100 * scores["base"]["mean"]["score"] - base["published"])
    row = rows["ri | tsv", "written"]
    assert row["published"] == (None if family == "fusionbench" else 80.3), "never a number of another family"
    assert (to / "report.html").is_file()


def test_the_papers_numbers_are_printed_beside_ours(models, data, tmp_path, cache):
    more = ["--models", str(models), "--data", str(data), "--to", str(tmp_path / "out"), "--protocol", "default"]
    done = CliRunner().invoke(app, ["bench", "clip-8", "--how=average", "--rows", "3", *more])
    assert done.exit_code == 0, done.output
    assert "published beside ours" in done.output
    assert "48.3" in done.output, "zero-shot ViT-B/32 on 8 tasks"
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {task["test"] for task in scores["tasks"]} == {3}
    assert not any(row["tuned"] for row in scores["rows"])


def test_unlabeled_pictures_may_be_drawn_where_there_are_none(models, data, tmp_path, cache):
    more = ["--models", str(models), "--data", str(data), "--to", str(tmp_path / "out"), "--protocol", "default"]
    how = ["--how", "ri(steps=1, batch=4) | average", "--rows", "2", "--inputs", "dead-leaves:12"]
    done = CliRunner().invoke(app, ["bench", "clip-8", *how, *more])
    assert done.exit_code == 0, done.output


def test_a_dry_run_says_all_that_is_missing_and_downloads_nothing(models, data, tmp_path, cache):
    (tmp_path / "empty").mkdir()
    more = ["--models", str(tmp_path / "empty"), "--data", str(tmp_path / "empty"), "--to", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["bench", "clip-8", *more, "--dry-run", "--json"])
    assert done.exit_code == 1
    said = " ".join(str(one) for one in json.loads(done.stdout)["errors"])
    assert "nonlinear_zeroshot.pt is missing" in said
    assert "no data set tanganke/stanford_cars" in said
    more = ["--models", str(models), "--data", str(data), "--to", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["bench", "clip-8", *more, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["clip-8", "--network", "ViT-B/31"], "did you mean 'ViT-B/32'"),
        (["clip-8", "--family", "tall"], "known: tall-masks, task-vectors, fusionbench"),
        (["clip-20", "--family", "task-vectors"], "has 8 tasks"),
        (["clip-8", "--protocol", "tund"], "did you mean 'tuned'"),
        (["clip-9"], "unknown suite 'clip-9'"),
        (["text", "--data", "x", "--network", "ViT-B/32"], "has no --network"),
        (["domains"], "needs --data"),
        (["clip-8", "--data", "."], "give --models"),
    ],
)
def test_wrong_options_are_named_before_any_work(args, says, cache):
    done = CliRunner().invoke(app, ["bench", *args])
    assert done.exit_code == 1
    assert says in " ".join(done.output.split())


def test_what_is_known_of_the_tasks():
    facts = clip.facts()
    counts = {"Cars": 196, "DTD": 47, "EuroSAT": 10, "GTSRB": 43, "RESISC45": 45, "SUN397": 397, "Flowers102": 102}
    counts |= {"OxfordIIITPet": 37, "CIFAR100": 100, "Food101": 101, "FER2013": 7, "EMNIST": 10, "EMNIST-letters": 26}
    for name, n in counts.items():
        assert len(facts[name]["classes"]) == n
    assert set(clip.TASKS) <= set(facts)
    assert all("{}" in template for told in facts.values() for template in told["template"])
    assert open_suite("clip-20", family="fusionbench").NAMES[-2] == "EMNIST-letters"
    assert len(SUITES) == len(set(SUITES))


@pytest.fixture
def drawn(tmp_path):
    """Return DomainNet's layout with seven classes and two domains beside the photographs."""
    root, names = tmp_path / "domainnet", [f"class_{k}" for k in range(7)]
    for domain in ("real", "clipart", "sketch"):
        for split, n in (("train", 42), ("test", 14)):
            lines = []
            for k in range(n):
                path = root / domain / names[k % 7] / f"{split}{k}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture(k))
                lines.append(f"{path.relative_to(root)} {k % 7}")
            (root / f"{domain}_{split}.txt").write_text("\n".join(lines) + "\n")
    folders(root / "aux" / "pictures", ["some"], 24)
    return root


def test_domainnet_fine_tunes_two_halves_and_scores_them_elsewhere(drawn, models, tmp_path, cache, monkeypatch):
    from merganser.suites.suite import shortened

    plain = domainnet.suite
    monkeypatch.setattr(domainnet, "suite", lambda **told: shortened(plain(**told), steps=3, batch=4))
    more = ["--models", str(models), "--data", str(drawn), "--to", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, ["bench", "domainnet", *ARGS, *more])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    scores = told["scores"]
    assert [task["name"] for task in scores["tasks"]] == ["real_s0", "real_s1"]
    assert [task["classes"] for task in scores["tasks"]] == [4, 3], "two halves of the classes"
    assert [t["name"] for t in scores["domains"]["tasks"]] == ["clipart_s0", "clipart_s1", "sketch_s0", "sketch_s1"]
    known = {row["row"].split(":")[0]: row["published"] for row in told["published"]["rows"]}
    assert known == {"clipart_s0": 79.1, "clipart_s1": 76.3, "sketch_s0": None, "sketch_s1": None}


def test_all_twenty_data_sets_are_read_in_the_layouts_they_have(data, models, cache):
    tasks = open_suite("clip-20", models=models).tasks(data)
    assert list(tasks) == list(clip.TASKS), "the papers' order"
    for task in tasks.values():
        assert [len(task.split(name)) for name in ("train", "val", "test")] == [18, 2, 6], task.name


def test_held_out_rows_are_neither_trained_on_nor_missing(drawn, tmp_path, cache):
    suite = open_suite("domainnet")
    folder = suite.folders(drawn, {})["real_s1"]
    task = read_task(folder)
    train, val = task.split("train"), task.split("val")
    names = [{str(p) for p in split.raw.encoded} for split in (train, val)]
    assert len(names[0] | names[1]) == 18, "six pictures of each of three classes"
    assert not names[0] & names[1]
    assert len(val) == 1, "a tenth"
    assert set(train.labels) | set(val.labels) == {0, 1, 2}, "labels are counted from the half's first class"


def test_pictures_come_from_every_layout(data, drawn, tmp_path):
    places = {
        "parquet": split_files(data / "tanganke" / "dtd", "train"),
        "tar": split_files(data / "clip-benchmark" / "wds_fer2013", "train"),
        "folder": split_files(data / "nateraw" / "rendered-sst2", "train"),
    }
    for layout, found in places.items():
        pictures, labels = read_pictures(found)
        assert len(pictures) == len(labels) == 20, layout
        assert pictures[0].size == (24, 20)
    assert [p.name for p in places["parquet"]] == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    unlabeled = read_unlabeled([data / "aux" / "pictures"], 12)
    assert isinstance(unlabeled, Pictures)
    assert len(unlabeled) == 12


def test_damaged_pictures_and_tables_are_named(drawn, tmp_path):
    bad = tmp_path / "bad" / "test" / "one"
    bad.mkdir(parents=True)
    (bad / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"x\.jpg: not a picture"):
        read_pictures([bad.parent])[0][0]
    parquet(tmp_path / "t.parquet", 3, 4, ("pixels", "label"))
    with pytest.raises(DataError, match="no column of pictures"):
        read_pictures([tmp_path / "t.parquet"])
    (tmp_path / "l.txt").write_text("nowhere.jpg 3\n")
    with pytest.raises(DataError, match=r"line 1: .*does not exist"):
        read_pictures([tmp_path / "l.txt"])
    (tmp_path / "x.tar").write_bytes(b"x" * 600)
    with pytest.raises(DataError, match="not a WebDataset"):
        read_pictures([tmp_path / "x.tar"])
    (drawn / "real_train.txt").write_text("real/a/x.jpg 0\nreal/a/y.jpg 5\n")
    with pytest.raises(DataError, match="no picture with label 1"):
        open_suite("domainnet").tasks(drawn)
    folder = tmp_path / "task"
    folder.mkdir()
    says = 'name = "t"\nkind = "image"\nclasses = ["a"]\n[files]\n'
    for line, error in (('tset = "x"', "has no 'tset'"), ('test = "x"', "does not exist"), ("labels = [3, 1]", "give")):
        (folder / "task.toml").write_text(says + line)
        with pytest.raises(DataError, match=error):
            read_task(folder)
