"""Families of image processors: the text that replaces the placeholder of an image, computed from the image size.

The chat template prints a placeholder for each image. Before the text is tokenized, the processor of the model replaces
the placeholder with the tokens that stand for the features of the image, and with separators. `ImageFamily.expand`
returns this text. The formulas follow the processors of transformers 5.24, and `tests/images` compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftdata.errors import BadRow
from ftdata.images.grids import Grid, closest_ratio, cut_padding, fit_area, least_upscaling, most_pixels
from ftdata.registry import Registry

Settings = Mapping[str, Any]
"""The settings of a processor that its formula reads, such as the size of a patch in pixels."""

Tokens = Mapping[str, str]
"""The texts of the tokens that a formula prints, by the names that processors give them."""

Expand = Callable[[int, int, Settings, Tokens], str]
"""Returns the text that replaces the placeholder of an image: (width, height, settings, tokens) -> text."""


@dataclass(frozen=True)
class ImageFamily:
    """The processors that expand an image in the same way.

    Attributes:
        processors: names of the processor classes.
        placeholder: name of the token that the chat template prints for an image.
        expand: the formula.
        tokens: the tokens that the formula prints, with the texts that the class of the processor gives them.
        image_settings: settings of the image processor that the formula reads, with the defaults of its class.
        processor_settings: settings of the processor that the formula reads, with the defaults of its class.
        feature: name of the token that the model replaces with a feature of the image.
        arguments: returns the arguments that the processor passes to its image processor, from the settings.
    """

    processors: tuple[str, ...]
    placeholder: str
    expand: Expand
    tokens: Tokens
    image_settings: Settings = field(default_factory=dict)
    processor_settings: Settings = field(default_factory=dict)
    feature: str = "image_token"
    arguments: Callable[[Settings], Settings] = lambda _: {}


_MAX_RATIO = 200
"""Maximum aspect ratio of an image in the processors of Qwen and GLM."""


def _check_ratio(width: int, height: int, resized: tuple[int, int] | None = None) -> None:
    """Check the aspect ratio of an image, or of the image after its first resize.

    Raises:
        BadRow: `image_ratio`.
    """
    sides = resized or (width, height)
    if max(sides) > _MAX_RATIO * min(sides):
        raise _aspect_ratio_error(width, height, f"expected at most {_MAX_RATIO}:1")


def _aspect_ratio_error(width: int, height: int, limit: str) -> BadRow:
    ratio = max(width, height) / min(width, height)
    problem = f"the image has {width} x {height} pixels, an aspect ratio of {ratio:.0f}:1; {limit}"
    return BadRow("image_ratio", problem, hint="crop the image, or remove the row")


def _qwen_vl(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    _check_ratio(width, height)
    size = settings["size"] or {}
    least = settings["min_pixels"] if settings["min_pixels"] is not None else size["shortest_edge"]
    most = settings["max_pixels"] if settings["max_pixels"] is not None else size["longest_edge"]
    grid = fit_area(height, width, settings["patch_size"] * settings["merge_size"], least, most)
    return tokens["image_token"] * grid.cells


def _glm4v(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    unit = settings["patch_size"] * settings["merge_size"]
    scale = max(1, unit / min(width, height))
    resized = int(width * scale), int(height * scale)
    _check_ratio(width, height, resized)
    limits = settings["size"]["shortest_edge"], settings["size"]["longest_edge"]
    return tokens["image_token"] * fit_area(*resized[::-1], unit, *limits, settings["temporal_patch_size"]).cells


def _gemma3(width: int, height: int, settings: Settings, tokens: Tokens) -> str:  # noqa: ARG001  (all images have the same tokens)
    features = tokens["image_token"] * settings["image_seq_length"]
    return f"\n\n{tokens['boi_token']}{features}{tokens['eoi_token']}\n\n"


def _gemma4(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    most: int = settings["max_soft_tokens"]
    unit = settings["pooling_kernel_size"] * settings["patch_size"]
    scale = math.sqrt(most * unit**2 / (height * width))
    grid = Grid(math.floor(scale * height / unit), math.floor(scale * width / unit))
    if not grid.rows:
        grid = Grid(1, min(width // height, most))
    elif not grid.columns:
        grid = Grid(min(height // width, most), 1)
    return tokens["boi_token"] + tokens["image_token"] * grid.cells + tokens["eoi_token"]


_MAX_SIDE = 4096
"""Maximum side of an image in the processors of Idefics 3 and SmolVLM, in pixels."""


def _idefics3(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    border, features = tokens["fake_image_token"], tokens["image_token"] * settings["image_seq_len"]
    whole = f"{border}{tokens['global_image_token']}{features}{border}"
    tiles = _idefics3_tiles(width, height, settings)
    if tiles.cells == 1:
        return whole
    rows = [
        "".join(f"{border}<row_{row}_col_{column}>{features}" for column in range(1, tiles.columns + 1)) + "\n"
        for row in range(1, tiles.rows + 1)
    ]
    return "".join(rows) + "\n" + whole


def _idefics3_tiles(width: int, height: int, settings: Settings) -> Grid:
    if not settings["do_image_splitting"]:
        return Grid(1, 1)
    long, short = max(width, height), min(width, height)
    # The processor divides or multiplies by width / height, and the results differ by a rounding error.
    ratio, is_wide = width / height, width >= height
    if settings["do_resize"]:
        long = settings["size"]["longest_edge"]
        short = _scale_short_side(long, ratio, is_wide=is_wide)
        short = max(short + short % 2, 1)
        if long > _MAX_SIDE:
            ratio = long / short if is_wide else short / long
            long = _MAX_SIDE
            short = max(1, _scale_short_side(long, ratio, is_wide=is_wide))
    ratio = long / short if is_wide else short / long
    tile = settings["max_image_size"]["longest_edge"]
    along = math.ceil(long / tile)
    across = math.ceil(_scale_short_side(along * tile, ratio, is_wide=is_wide) / tile)
    if not across:
        raise _aspect_ratio_error(width, height, "its short side would have less than one pixel after the resize")
    return Grid(across, along) if is_wide else Grid(along, across)


def _scale_short_side(long: int, ratio: float, *, is_wide: bool) -> int:
    return int(long / ratio if is_wide else long * ratio)


def _count_features(patches: int, settings: Settings) -> int:
    """Return the number of features, with those that the vision tower adds or drops, such as its class token."""
    drops_first: bool = settings["vision_feature_select_strategy"] == "default"
    return patches + int(settings["num_additional_image_tokens"]) - drops_first


def _llava(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    size, crop_size, patch = settings["size"], settings["crop_size"], settings["patch_size"]
    if settings["do_pad"]:
        width = height = max(width, height)
    if settings["do_resize"] and size.get("shortest_edge"):
        side = size["shortest_edge"]
        if width <= height:
            width, height = side, int(side * height / width)
        else:
            width, height = int(side * width / height), side
    elif settings["do_resize"]:
        width, height = size["width"], size["height"]
    if settings["do_center_crop"]:
        width, height = crop_size["width"], crop_size["height"]
    return tokens["image_token"] * _count_features((height // patch) * (width // patch), settings)


def _llava_next(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    tile = settings["crop_size"] if settings["do_center_crop"] else settings["size"]
    tile_height, tile_width = (tile.get(name) or tile["shortest_edge"] for name in ("height", "width"))
    canvas_height, canvas_width = most_pixels(height, width, settings["image_grid_pinpoints"])
    rows, columns = tile_height // settings["patch_size"], tile_width // settings["patch_size"]
    canvas = Grid(rows * (canvas_height // tile_height), columns * (canvas_width // tile_width))
    kept = cut_padding(height, width, canvas)
    # The model adds a newline feature after each row.
    tiles = kept.cells + kept.rows
    return tokens["image_token"] * (tiles + _count_features(rows * columns, settings))


def _pixtral(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    scale = max(width, height) / settings["size"]["longest_edge"]
    resized_width, resized_height = (math.floor(side / scale) if scale > 1 else side for side in (width, height))
    if not resized_width or not resized_height:
        raise _aspect_ratio_error(width, height, "its short side would have less than one pixel after the resize")
    patch = settings["patch_size"] * settings["spatial_merge_size"]
    row = tokens["image_token"] * math.ceil(resized_width / patch)
    rows = [row] * math.ceil(resized_height / patch)
    return tokens["image_break_token"].join(rows) + tokens["image_end_token"]


def _count_tiles(width: int, height: int, settings: Settings) -> int:
    """Return the number of tiles of an image, with its thumbnail if it has several tiles."""
    size = settings["size"]
    fewest, most = settings["min_patches"], settings["max_patches"]
    tiles = closest_ratio(height, width, fewest, most, size["height"] * size["width"]).cells if most > 1 else 1
    return tiles + (tiles > 1)


def _internvl(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    count: int = settings["image_seq_length"] * _count_tiles(width, height, settings)
    features = tokens["context_image_token"] * count
    return tokens["start_image_token"] + features + tokens["end_image_token"]


def _aya_vision(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    side: int = settings["img_size"] // (settings["patch_size"] * settings["downsample_factor"])
    features = tokens["img_patch_token"] * side**2
    tile = tokens["tile_token"]
    tiles = "".join(f"{tile}_{number}{features}" for number in range(1, _count_tiles(width, height, settings)))
    whole = tokens["tile_global_token"] + features
    return tokens["start_of_img_token"] + tiles + whole + tokens["end_of_img_token"]


def _lfm2_vl(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    patch, token = settings["encoder_patch_size"], tokens["image_token"]
    unit, tile = patch * settings["downsample_factor"], settings["tile_size"]
    most = settings["max_image_tokens"] * unit**2
    whole = fit_area(height, width, unit, settings["min_image_tokens"] * unit**2, most, fewest=1)
    rounded_area = math.prod(max(patch, round(side / unit) * unit) for side in (width, height))
    tiles = Grid(1, 1)
    is_large = rounded_area > most * settings["max_pixels_tolerance"]
    if is_large and settings["do_image_splitting"] and settings["max_tiles"] > 1:
        tiles = closest_ratio(height, width, settings["min_tiles"], settings["max_tiles"], tile**2)
    text = token * whole.cells
    if tiles.cells > 1:
        features = token * math.ceil(tile // patch / settings["downsample_factor"]) ** 2
        thumbnail = tokens["image_thumbnail"] + text if settings["use_thumbnail"] else ""
        cells = [(row, column) for row in range(1, tiles.rows + 1) for column in range(1, tiles.columns + 1)]
        text = "".join(f"<|img_row_{row}_col_{column}|>{features}" for row, column in cells) + thumbnail
    return tokens["image_start_token"] + text + tokens["image_end_token"]


def _llama4(width: int, height: int, settings: Settings, tokens: Tokens) -> str:
    side = settings["size"]["height"]
    tiles = least_upscaling(height, width, side, settings["max_patches"], largest=settings["resize_to_max_canvas"])
    shuffled = round(1 / settings["pixel_shuffle_ratio"] ** 2)
    features = tokens["patch_token"] * ((side // settings["patch_size"]) ** 2 // shuffled)
    row = "<|tile_x_separator|>".join([features] * tiles.columns) + "<|tile_y_separator|>"
    all_tiles = row * tiles.rows if tiles.cells > 1 else ""
    return f"<|image_start|>{all_tiles}<|image|>{features}<|image_end|>"


def _mllama(width: int, height: int, settings: Settings, tokens: Tokens) -> str:  # noqa: ARG001  (the image is not in the text)
    return tokens["image_token"]


_SQUARE_224 = {"height": 224, "width": 224}
_TILES = {"size": {"height": 384, "width": 384}, "min_patches": 1, "max_patches": 12}
_LLAVA = {"patch_size": None, "num_additional_image_tokens": 0, "vision_feature_select_strategy": None}
_GEMMA = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}

_BUILT_IN = {
    "qwen_vl": ImageFamily(
        ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"),
        "image_token",
        _qwen_vl,
        {"image_token": "<|image_pad|>"},
        {
            "patch_size": 14,
            "merge_size": 2,
            "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
            "min_pixels": None,
            "max_pixels": None,
        },
    ),
    "glm4v": ImageFamily(
        ("Glm4vProcessor", "Glm46VProcessor"),
        "image_token",
        _glm4v,
        {"image_token": "<|image|>"},
        {
            "patch_size": 14,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000},
        },
    ),
    "gemma3": ImageFamily(
        ("Gemma3Processor",),
        "boi_token",
        _gemma3,
        _GEMMA,
        processor_settings={"image_seq_length": 256},
        arguments=lambda _: {"do_pan_and_scan": False},
    ),
    "gemma3n": ImageFamily(
        ("Gemma3nProcessor",), "image_token", _gemma3, _GEMMA, processor_settings={"image_seq_length": 256}
    ),
    "gemma4": ImageFamily(
        ("Gemma4Processor",),
        "image_token",
        _gemma4,
        {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"},
        {"patch_size": 16, "pooling_kernel_size": 3, "max_soft_tokens": 280},
    ),
    "idefics3": ImageFamily(
        ("Idefics3Processor", "SmolVLMProcessor"),
        "image_token",
        _idefics3,
        {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
        },
        {
            "size": {"longest_edge": 4 * 364},
            "max_image_size": {"longest_edge": 364},
            "do_image_splitting": True,
            "do_resize": True,
        },
        {"image_seq_len": 169},
    ),
    "llava": ImageFamily(
        ("LlavaProcessor",),
        "image_token",
        _llava,
        {"image_token": "<image>"},
        {
            "size": {"shortest_edge": 224},
            "crop_size": _SQUARE_224,
            "do_resize": True,
            "do_center_crop": True,
            "do_pad": False,
        },
        _LLAVA,
    ),
    "llava_next": ImageFamily(
        ("LlavaNextProcessor",),
        "image_token",
        _llava_next,
        {"image_token": "<image>"},
        {
            "size": {"shortest_edge": 224},
            "crop_size": _SQUARE_224,
            "do_center_crop": True,
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        },
        _LLAVA,
    ),
    "pixtral": ImageFamily(
        ("PixtralProcessor",),
        "image_token",
        _pixtral,
        {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
        {"size": {"longest_edge": 1024}},
        {"patch_size": 16, "spatial_merge_size": 1},
        arguments=lambda settings: {"patch_size": settings["patch_size"] * settings["spatial_merge_size"]},
    ),
    "internvl": ImageFamily(
        ("InternVLProcessor",),
        "context_image_token",
        _internvl,
        {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"},
        _TILES,
        {"image_seq_length": 256},
        feature="context_image_token",
        arguments=lambda _: {"crop_to_patches": True},
    ),
    "aya_vision": ImageFamily(
        ("AyaVisionProcessor",),
        "image_token",
        _aya_vision,
        {
            "image_token": "<image>",
            "start_of_img_token": "<|START_OF_IMG|>",
            "end_of_img_token": "<|END_OF_IMG|>",
            "img_patch_token": "<|IMG_PATCH|>",
            "tile_token": "TILE",
            "tile_global_token": "TILE_GLOBAL",
        },
        _TILES,
        {"patch_size": 28, "img_size": 364, "downsample_factor": 1},
        feature="img_patch_token",
        arguments=lambda _: {"crop_to_patches": True},
    ),
    "lfm2_vl": ImageFamily(
        ("Lfm2VlProcessor",),
        "image_token",
        _lfm2_vl,
        {
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail": "<|img_thumbnail|>",
        },
        {
            "encoder_patch_size": 16,
            "downsample_factor": 2,
            "tile_size": 512,
            "min_tiles": 2,
            "max_tiles": 10,
            "min_image_tokens": 64,
            "max_image_tokens": 256,
            "max_pixels_tolerance": 2.0,
            "use_thumbnail": True,
            "do_image_splitting": True,
        },
    ),
    "llama4": ImageFamily(
        ("Llama4Processor",),
        "image_token",
        _llama4,
        {"image_token": "<|image|>", "patch_token": "<|patch|>"},
        {"size": {"height": 336, "width": 336}, "max_patches": 16, "resize_to_max_canvas": False},
        {"patch_size": 14, "pixel_shuffle_ratio": 0.5},
        feature="patch_token",
    ),
    "mllama": ImageFamily(("MllamaProcessor",), "image_token", _mllama, {"image_token": "<|image|>"}),
}
"""Name -> family."""

image_families: Registry[ImageFamily] = Registry("ftdata.image_families", "image family")
"""All families. A plug-in can add a family."""

for _name, _family in _BUILT_IN.items():
    image_families.register(_name)(_family)
