"""The demo: typefaces kept apart, splits that share nothing, a base and experts that a recipe can open."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from merganser.errors import DataError, MissingExtra
from merganser.evaluate.task import read_task
from merganser.models.encoder import features
from merganser.models.open import open_encoder
from merganser.models.toy import ConvNet
from merganser.weights.save import save

if any(find_spec(name) is None for name in ("matplotlib", "PIL", "sklearn", "mlxtend")):
    pytest.skip("the 'demo' extra is not installed", allow_module_level=True)

from merganser.progress import silent
from merganser.suites import demo as d
from merganser.suites import glyphs as g

NAMES = ["digits", "mnist", *d.LETTERS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    to = tmp_path_factory.mktemp("demo")
    d.make_data(to, NAMES, d.Settings.small(), 0, silent)
    return to


def test_no_face_of_val_or_test_is_seen_by_any_model():
    assert not set(d.VAL) & set(d.TEST)
    assert not {*d.VAL, *d.TEST} & {*d.SEEN, *d.TRAIN}


def test_no_character_of_a_task_is_pretrained_on():
    assert not set(d.OTHERS) & {*"".join(d.LETTERS.values()), *g.DIGITS}
    assert len(set(d.ALL)) == len(d.ALL)


def test_every_face_of_a_task_has_all_its_characters():
    for characters in d.LETTERS.values():
        assert all(g.has(face, c) for face in (*d.TRAIN, *d.VAL, *d.TEST) for c in characters)


def test_glyphs_are_of_their_seed():
    x, y = g.glyphs("ABC", d.VAL, 20, 3)
    again, labels = g.glyphs("ABC", d.VAL, 20, 3)
    other, _ = g.glyphs("ABC", d.VAL, 20, 4)
    assert x.dtype == np.uint8
    assert x.shape == (20, g.SIZE, g.SIZE, 1)
    assert np.array_equal(x, again)
    assert np.array_equal(y, labels)
    assert not np.array_equal(x, other)


def test_drawing_leaves_other_random_numbers_alone():
    before = torch.random.get_rng_state()
    g.glyphs("AB", d.VAL, 4, 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_all_pairs_of_character_and_face_come_equally_often():
    _, y = g.glyphs("ABCDE", d.TRAIN, 40, 0)
    assert np.bincount(y).tolist() == [8] * 5


def test_a_character_that_a_face_lacks_is_left_out():
    assert not g.has("cmr10", "α")
    drawn = g.draw("aα", ("cmr10", "DejaVuSans"))
    pairs = list(zip(drawn.faces.tolist(), drawn.characters.tolist(), strict=True))
    assert pairs == [(0, 0), (1, 0), (1, 1)]


def test_a_glyph_is_centred_and_whole():
    for picture in g.draw("gWЩ", d.TEST).pixels:
        rows, columns = (np.flatnonzero(picture.max(axis=k)) for k in (1, 0))
        for lines in (rows, columns):
            assert lines[0] > 0
            assert lines[-1] < g.CANVAS - 1
            assert abs(lines[0] + lines[-1] - g.CANVAS + 1) <= 4  # Pillow places a glyph on whole pixels


def test_without_noise_and_bends_a_glyph_keeps_its_shape():
    still = g.Bend(rotation=0, smallest=1, largest=1, shear=0, shift=0, elastic=0, noise=0, stroke=0)
    clean = torch.from_numpy(g.draw("R", ("DejaVuSans",)).pixels)[:, None].float() / 255
    bent = g.distort(clean, torch.Generator().manual_seed(0), still)
    inner = clean[:, :, 6:42, 6:42]
    expected = torch.nn.functional.interpolate(inner, size=(g.SIZE, g.SIZE), mode="bilinear", align_corners=False)
    factor = (bent.sum() / expected.sum()).item()
    assert 0.7 <= factor <= 1
    torch.testing.assert_close(bent, expected * factor, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_tasks_read_as_tasks(made, name):
    task = read_task(made / "tasks" / name)
    assert task.kind == "image"
    assert len(task.classes) == {"upper": 26, "lower": 26, "greek": 24, "cyrillic": 32}.get(name, 10)
    sizes = d.Settings.small()
    for split, n in (("train", sizes.train), ("val", sizes.val), ("test", sizes.test)):
        rows = task.split(split)
        assert rows.raw.shape == (n, g.SIZE, g.SIZE, 1)
        assert rows.raw.dtype == np.uint8


@pytest.mark.parametrize("name", NAMES)
def test_no_image_is_in_two_splits(made, name):
    task = read_task(made / "tasks" / name)
    images = {split: {x.tobytes() for x in task.split(split).raw} for split in ("train", "val", "test")}
    assert not images["train"] & images["val"]
    assert not images["train"] & images["test"]
    assert not images["val"] & images["test"]


def test_classes_of_a_task_are_its_characters(made):
    for name, characters in d.LETTERS.items():
        assert "".join(read_task(made / "tasks" / name).classes) == characters


def test_what_is_drawn_is_not_drawn_again(made):
    before = (made / "inputs.npz").stat().st_mtime_ns
    d.make_data(made, NAMES, d.Settings.small(), 0, silent)
    assert (made / "inputs.npz").stat().st_mtime_ns == before


def test_another_seed_draws_other_tasks(made, tmp_path):
    d.make_data(tmp_path, ["greek"], d.Settings.small(), 1, silent)
    a, b = (read_task(to / "tasks" / "greek").split("test").raw for to in (made, tmp_path))
    assert not np.array_equal(a, b)


def test_net_gives_unit_features_of_its_width():
    net = ConvNet((8, 16, 24), width=12)
    x = net(torch.rand(3, 1, g.SIZE, g.SIZE))
    assert x.shape == (3, 12)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(3))


def test_net_keeps_no_running_statistics():
    net = ConvNet()
    assert not list(net.buffers())
    norms = [m for m in net.modules() if "Norm" in type(m).__name__]
    assert norms
    assert all(isinstance(m, torch.nn.GroupNorm) for m in norms)


def test_an_image_has_the_same_features_in_any_batch():
    net, x = ConvNet().eval(), torch.rand(5, 1, g.SIZE, g.SIZE)
    torch.testing.assert_close(net(x)[3:4], net(x[3:4]), atol=1e-5, rtol=1e-4)


def test_net_opens_as_an_encoder(tmp_path, made):
    net = ConvNet((8, 16, 24), width=12)
    save(net.state_dict(), tmp_path)
    encoder = open_encoder("merganser.models.toy:conv_net", tmp_path, channels=[8, 16, 24], width=12)
    inputs = encoder.prepare(read_task(made / "tasks" / "upper").split("val").raw)
    x = features(encoder, net.state_dict(), inputs, kind="fp32")
    torch.testing.assert_close(x, net(inputs.take(torch.arange(len(inputs)))).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("raw", [np.zeros((2, 24, 24), np.uint8), np.zeros((2, 24, 24, 1)), np.zeros((2, 24, 24, 3))])
def test_net_refuses_what_is_no_grey_picture(raw):
    with pytest.raises(DataError, match="uint8"):
        ConvNet().prepare(raw)


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(g, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match=r"merganser\[demo\]"):
        d.demo(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_base_that_was_stopped_ends_in_the_same_bytes(tmp_path, monkeypatch):
    few = d.Settings.small()
    d.make_base(tmp_path / "whole", few, 0, silent)
    monkeypatch.setattr(d.Checkpoint, "due", lambda self: True)
    write, left = d.Checkpoint.write, [2]

    def stop(self, *state):
        write(self, *state)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(d.Checkpoint, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        d.make_base(tmp_path / "stopped", few, 0, silent)
    assert not (tmp_path / "stopped" / "card.json").exists()
    d.make_base(tmp_path / "stopped", few, 0, silent)
    assert d.digest(d.Stored(tmp_path / "stopped")) == d.digest(d.Stored(tmp_path / "whole"))


@pytest.mark.slow
def test_the_whole_demo_and_a_second_run_that_does_nothing(tmp_path):
    report = d.demo(tmp_path, settings=d.Settings.small())
    assert report == tmp_path / "report.html"
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [task["name"] for task in scores["tasks"]] == NAMES
    mergers = [text.split()[0] for text in d.MERGERS]
    for adapted in (False, True):
        found = {row["merge"] for row in scores["rows"] if (row["adapt"] is not None) == adapted}
        assert found == set(mergers)
    assert len(scores["curves"]) == 2 * (len(mergers) - 1)
    made = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.suffix in (".npz", ".safetensors")}
    assert d.demo(tmp_path, settings=d.Settings.small()) == report
    stages = json.loads((tmp_path / "run.json").read_text())["stages"]
    assert all(stage["reused"] for stage in stages)
    assert made == {p: p.stat().st_mtime_ns for p in made}
