"""Image encoders, CLIP's zero-shot head and the preparation of pictures, against transformers' own."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from merganser.errors import DataError, HeadError, WeightsError
from merganser.models.encoder import call, features
from merganser.models.hf import clip_prompts, clip_zero_shot_head, image_encoder
from merganser.models.inputs import Images
from merganser.models.pixels import Pixels, read_pixels

PHOTOS = ["a photo of a {}.", "the {} sits."]


def pictures(n, height, width, channels=3, seed=0):
    """Smooth random pictures (noise would make every resampling look different)."""
    coarse = torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def test_clip_image_embeddings(write, batch_of):
    folder, model = write("clip", "CLIPModel")
    encoder = image_encoder(folder)
    pixels = batch_of(encoder, pictures(3, 24, 24))
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(call(encoder, {}, pixels), expected, atol=5e-6, rtol=0)


def test_whole_clip_checkpoints_work_and_the_text_tower_is_not_the_encoders(write):
    folder, _ = write("clip", "CLIPModel")
    other, moved = write("clip", "CLIPModel", seed=1)
    encoder = image_encoder(folder)
    pixels = torch.randn(2, 3, 24, 24)
    weights = load_file(other / "model.safetensors")
    with torch.no_grad():
        expected = moved.get_image_features(pixels).pooler_output
    torch.testing.assert_close(call(encoder, weights, pixels), expected, atol=5e-6, rtol=0)
    vision = {n for n in weights if n.startswith(("vision_model.", "visual_projection."))}
    assert {encoder.prefix + n for n in vision} == {n for n, _ in encoder.named_parameters()}


def test_vision_tower_alone(write):
    import transformers

    folder, _ = write("clip", "CLIPModel")
    config = transformers.CLIPVisionConfig.from_pretrained(folder, projection_dim=16)
    alone = transformers.CLIPVisionModelWithProjection.from_pretrained(folder, config=config).eval()
    tower = folder.parent / f"{folder.name}-vision"
    alone.save_pretrained(tower)
    pixels = torch.randn(2, 3, 24, 24)
    assert torch.equal(call(image_encoder(tower), {}, pixels), call(image_encoder(folder), {}, pixels))
    encoder = image_encoder(tower)
    assert not hasattr(encoder, "logit_scale")
    with pytest.raises(HeadError, match="without a text tower"):
        encoder.prompts(["a cat"])


@pytest.mark.parametrize("pooling", ["cls", "pooler", "mean"])
def test_vit(write, pooling):
    folder, model = write("vit", "ViTModel")
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        out = model(pixels)
    hidden = out.last_hidden_state
    expected = {"cls": hidden[:, 0], "pooler": out.pooler_output, "mean": hidden[:, 1:].mean(1)}[pooling]
    torch.testing.assert_close(call(image_encoder(folder, pooling=pooling), {}, pixels), expected, atol=5e-6, rtol=0)


def test_zero_shot_head_is_clips_formula(write):
    folder, model = write("clip", "CLIPModel")
    classes = ["cat", "red car", "dog"]
    head = clip_zero_shot_head(folder, classes, PHOTOS)
    rows = []
    for name in classes:
        units = []
        for template in PHOTOS:
            ids = image_encoder_ids(folder, template.replace("{}", name))
            with torch.no_grad():
                text = model.get_text_features(**ids).pooler_output[0]
            units.append(text / text.norm())
        mean = torch.stack(units).mean(0)
        rows.append(mean / mean.norm() * model.logit_scale.exp().item())
    torch.testing.assert_close(head.weight, torch.stack(rows), atol=1e-5, rtol=1e-5)
    assert head.normalize
    assert head.bias is None


def test_zero_shot_logits_with_one_template_are_clips_own(write, batch_of):
    folder, model = write("clip", "CLIPModel")
    encoder = image_encoder(folder)
    pixels = batch_of(encoder, pictures(4, 24, 24))
    head = clip_zero_shot_head(folder, ["cat", "red car", "dog"], "a photo of a {}.")
    ids = image_encoder_ids(folder, ["a photo of a cat.", "a photo of a red car.", "a photo of a dog."])
    with torch.no_grad():
        expected = model(**ids, pixel_values=pixels).logits_per_image
        torch.testing.assert_close(head(encoder(pixels)), expected, atol=1e-4, rtol=1e-5)
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert torch.equal(encoder.prompts(["a cat", "a dog"]), clip_prompts(folder, ["a cat", "a dog"]))


def image_encoder_ids(folder, texts):
    from transformers import AutoTokenizer

    texts = [texts] if isinstance(texts, str) else texts
    ids = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    return {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}


def test_images_are_normalised():
    pixels = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    images = Images(pixels, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    batch = images.take(torch.tensor([3, 1]))
    for c, (mean, std) in enumerate([(0.1, 0.4), (0.2, 0.5), (0.3, 0.6)]):
        torch.testing.assert_close(batch[:, c], (pixels[[3, 1], c].float() / 255 - mean) / std)
    assert torch.equal(features(torch.nn.Flatten(), {}, images, batch=2)[[3, 1]], batch.flatten(1))


# what CLIP and ViT ship with, at a small size; and sides that are cropped, padded and stretched
PROCESSORS = [
    ("CLIPImageProcessorPil", {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}),
    ("CLIPImageProcessorPil", {"size": {"shortest_edge": 20}, "crop_size": {"height": 24, "width": 22}}),
    ("CLIPImageProcessorPil", {"size": {"height": 30, "width": 26}, "crop_size": {"height": 24, "width": 24}}),
    ("ViTImageProcessorPil", {"size": {"height": 24, "width": 24}}),
    ("ViTImageProcessorPil", {"size": {"height": 16, "width": 24}, "resample": 3, "rescale_factor": 1 / 127.5}),
    ("ViTImageProcessorPil", {"size": {"height": 24, "width": 24}, "do_normalize": False}),
]


@pytest.mark.parametrize(("name", "says"), PROCESSORS)
@pytest.mark.parametrize("shape", [(40, 60), (60, 41), (24, 24), (18, 30)])
def test_prepare_does_what_the_processor_does(tmp_path, name, says, shape):
    transformers = pytest.importorskip("transformers")
    image = pytest.importorskip("PIL.Image")
    processor = getattr(transformers, name)(**says)
    processor.save_pretrained(tmp_path)
    prepare = read_pixels(tmp_path, size=24, channels=3, mean=(0, 0, 0), std=(1, 1, 1))
    raw = pictures(2, *shape)
    expected = torch.as_tensor(processor(list(raw), return_tensors="pt")["pixel_values"])
    both = torch.arange(2)
    level = 2.01 / 255 / min(prepare.std)  # bytes are rounded a little differently
    from_array = prepare(raw).take(both)
    torch.testing.assert_close(from_array, expected, atol=level, rtol=0)
    assert torch.equal(prepare([image.fromarray(r) for r in raw]).take(both), from_array)


def test_pictures_of_many_kinds():
    image = pytest.importorskip("PIL.Image")
    prepare = Pixels((8, 8))
    grey = pictures(3, 8, 8, channels=1)
    three = prepare(grey).pixels
    assert three.shape == (3, 3, 8, 8)
    assert torch.equal(three[:, 0], three[:, 2])
    assert torch.equal(prepare(grey[..., 0]).pixels, three)  # [n, h, w]
    assert torch.equal(prepare([image.fromarray(g[..., 0]) for g in grey]).pixels, three)
    assert prepare([image.new("RGBA", (20, 10)), image.new("P", (5, 5))]).pixels.shape == (2, 3, 8, 8)
    with pytest.raises(DataError, match="not uint8"):
        prepare(torch.rand(2, 8, 8, 3))
    with pytest.raises(DataError, match="2 channels, the encoder reads 3"):
        prepare(pictures(1, 8, 8, channels=2))
    with pytest.raises(DataError, match="5 axes"):
        prepare(torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(DataError, match="one size"):
        Pixels(8)([image.new("RGB", (20, 10)), image.new("RGB", (10, 10))])
    with pytest.raises(DataError, match="no pictures"):
        prepare([])


def test_processor_config_of_transformers_5(tmp_path):
    says = {"size": {"height": 8, "width": 6}, "resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": says}))
    assert read_pixels(tmp_path, size=24, channels=3, mean=(0,) * 3, std=(1,) * 3) == Pixels(
        (8, 6), None, "bilinear", [0.1, 0.2, 0.3], [1, 1, 1]
    )


def test_errors(write):
    folder, _ = write("clip", "CLIPModel")
    with pytest.raises(HeadError, match="use projection, cls, mean"):
        image_encoder(folder, pooling="pooler")
    with pytest.raises(HeadError, match=r"no \{\}"):
        clip_zero_shot_head(folder, ["cat"], ["a photo"])
    with pytest.raises(HeadError, match="at least one class"):
        clip_zero_shot_head(folder, [], "a {}")
    with pytest.raises(HeadError, match="no pooler"):
        image_encoder(write("vit", "ViTForImageClassification")[0], pooling="pooler")
    with pytest.raises(WeightsError, match="'bert' reads input_ids, not pixel_values"):
        image_encoder(write("bert", "BertModel")[0])
