"""The text of an image equals the text that the model's own processor prints for it."""

import json

import pytest
from PIL import Image
from vision import PROCESSORS, find_image_processor, make_processor

from ftdata.errors import BadRow, UsageError
from ftdata.images.families import image_families
from ftdata.images.processor import load_image_processor

SIZES = [
    (640, 480), (480, 640), (1, 1), (1, 30), (30, 1), (27, 28), (29, 3), (13, 13), (336, 336), (337, 335), (364, 364),
    (365, 728), (448, 449), (512, 512), (1000, 40), (40, 1000), (997, 991), (1100, 700), (700, 1100), (200, 300),
]  # fmt: skip
TOO_LONG = [(1, 201), (402, 2), (3, 999)]


@pytest.mark.parametrize("name", PROCESSORS)
def test_text_of_an_image_equals_the_text_of_the_processor(name, tmp_path):
    processor = make_processor(name)
    processor.save_pretrained(tmp_path)
    ours = load_image_processor(tmp_path)
    # Settings that change only the pixels.
    fast = {"do_rescale": False, "do_normalize": False, "resample": 0}
    for sizes in [*[[size] for size in SIZES if max(size) < 40 * min(size)], SIZES[3:6]]:
        images = [Image.new("RGB", size) for size in sizes]
        text = " b ".join(["<s>a", *[ours.placeholder] * len(sizes), "c"])
        expected = processor(
            images=images, text=text, return_tensors="np", images_kwargs=fast, add_special_tokens=False
        )
        expanded = iter(ours.expand(*size) for size in sizes)
        pieces = text.split(ours.placeholder)
        result = pieces[0] + "".join(next(expanded) + piece for piece in pieces[1:])
        assert processor.tokenizer.decode(expected["input_ids"][0], skip_special_tokens=False) == result, sizes


def test_number_of_image_tokens_of_pixtral_equals_the_size_of_the_features(tmp_path):
    """Its processor needs torchvision, unlike its image processor."""
    image_processor = find_image_processor("pixtral.Pixtral")(patch_size={"height": 16, "width": 16})
    (tmp_path / "preprocessor_config.json").write_text('{"processor_class": "PixtralProcessor"}')
    ours = load_image_processor(tmp_path)
    for size in SIZES:
        out = image_processor(images=[Image.new("RGB", size)], return_tensors="np", do_rescale=False)
        rows, columns = out["image_sizes"][0] // 16
        text = "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"
        assert ours.expand(*size) == text, size


@pytest.mark.parametrize("name", ["qwen2_vl", "glm4v"])
def test_image_that_is_too_long_is_rejected_like_in_the_processor(name, tmp_path):
    image_processor = make_processor(name).image_processor
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"processor_class": PROCESSORS[name][0]}))
    ours = load_image_processor(tmp_path)
    for size in TOO_LONG:
        with pytest.raises(ValueError, match="aspect ratio"):
            image_processor(images=[Image.new("RGB", size)])
        with pytest.raises(BadRow, match=f"the image has {size[0]} x {size[1]} pixels, an aspect ratio of"):
            ours.expand(*size)


def test_image_whose_short_side_vanishes_is_rejected(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"processor_class": "PixtralProcessor"}')
    with pytest.raises(BadRow, match="1025 x 1 pixels, an aspect ratio of 1025:1"):
        load_image_processor(tmp_path).expand(1025, 1)


# These processors need torchvision. The numbers are from transformers 5.24.0 with torchvision 0.29.1.
LFM2_VL = {
    (640, 480): (234, 0), (1, 1): (64, 0), (32, 2000): (128, 0), (1000, 700): (1783, 6), (1920, 1080): (2300, 8),
    (512, 512): (256, 0), (513, 511): (256, 0), (3000, 200): (2804, 10),
}  # fmt: skip
LLAMA4 = {
    (640, 480): (720, 4), (1, 1): (144, 0), (32, 2000): (1008, 6), (1000, 700): (1440, 9), (1920, 1080): (2304, 15),
    (512, 512): (720, 4), (513, 511): (720, 4), (3000, 200): (1440, 9),
}  # fmt: skip


@pytest.mark.parametrize(("processor", "token", "separator", "counts"), [
    ("Lfm2VlProcessor", "<image>", "<|img_row_", LFM2_VL),
    ("Llama4Processor", "<|patch|>", "separator|>", LLAMA4),
])  # fmt: skip
def test_number_of_image_tokens_of_processors_that_need_torchvision(processor, token, separator, counts, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"processor_class": processor}))
    ours = load_image_processor(tmp_path)
    for size, expected in counts.items():
        text = ours.expand(*size)
        assert (text.count(token), text.count(separator)) == expected, size


def test_every_family_has_its_own_processors():
    families = map(image_families.get, image_families.names())
    processors = [processor for family in families for processor in family.processors]
    assert len(processors) == len({*processors})


def test_unknown_processor_is_refused(tmp_path):
    assert load_image_processor(tmp_path) is None
    (tmp_path / "preprocessor_config.json").write_text('{"processor_class": "FuyuProcessor"}')
    with pytest.raises(UsageError, match=r"FuyuProcessor .* is not supported.*Qwen2VLProcessor"):
        load_image_processor(tmp_path)


def test_missing_setting_is_refused(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"processor_class": "LlavaProcessor"}')
    with pytest.raises(UsageError, match="has no patch_size and no vision_feature_select_strategy"):
        load_image_processor(tmp_path)


def test_fingerprint_depends_on_settings(tmp_path):
    config = tmp_path / "preprocessor_config.json"
    config.write_text('{"processor_class": "Qwen2VLProcessor"}')
    first = load_image_processor(tmp_path)
    config.write_text('{"processor_class": "Qwen2VLProcessor", "max_pixels": 1000}')
    assert load_image_processor(tmp_path).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_resize": False}, "does not resize images"),
        ({"size": {"height": 224, "width": 224}}, "'shortest_edge' is missing"),
        ({"size": {"shortest_edge": "x", "longest_edge": 5}}, "'shortest_edge': 'x'"),
        ({"patch_size": 0}, "a size is 0"),
        ({"merge_size": "2"}, "merge_size of the image processor in .* is '2', expected a number"),
    ],
)
def test_unsuitable_settings_are_refused(settings, reason, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor", **settings}))
    with pytest.raises(UsageError, match=reason):
        load_image_processor(tmp_path).expand(100, 100)
