"""Feed images to vision-language models: load and preprocess the images of a batch, and compute position ids."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ftdata.errors import UsageError, describe_exception
from ftdata.images.processor import load_image_processor
from ftdata.images.references import load_image
from ftdata.types import ImageReference

REFERENCES_COLUMN = "image_references"
"""The column with the images of a row during training. TRL would prepare a column with the name `images` itself."""

_TYPE_INPUTS = ("mm_token_type_ids", "token_type_ids")
"""Arguments of models for a tensor that is 1 at the tokens that the model replaces with features of images."""

_NO_TOKEN = -1
"""The id of the image token if the tokenizer has no image processor, and the rows contain only text."""

_IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class ImageCollator:
    """Makes batches of rows with images.

    Attributes:
        collate_text: makes a batch of the tokens and labels of rows.
        preprocess: the image processor of the model; `None` if the rows have no images.
        arguments: arguments for the image processor.
        folder: the folder of the build, which relative paths of images are resolved against.
        feature_id: id of the token that the model replaces with a feature of an image.
        inputs: names of the inputs that the model accepts.
    """

    collate_text: Callable[[list[dict[str, Any]]], dict[str, Any]]
    preprocess: Any
    arguments: Mapping[str, Any]
    folder: Path
    feature_id: int
    inputs: frozenset[str]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Load the images of the rows, and make a batch.

        Raises:
            InputRefused: `image_changed`, if the file of an image is missing or has changed since the build;
                `image_damaged`, if it cannot be decoded.
        """
        return self.collate(rows, [self._load(image) for row in rows for image in row.get(REFERENCES_COLUMN) or ()])

    def collate(self, rows: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> dict[str, Any]:
        """Make a batch of rows with the given images, which are in the order of the rows."""
        texts = [{name: value for name, value in row.items() if name != REFERENCES_COLUMN} for row in rows]
        batch = dict(self.collate_text(texts))
        types = (batch["input_ids"] == self.feature_id).long()
        batch |= {name: types for name in _TYPE_INPUTS if name in self.inputs}
        if images:
            features = self.preprocess(images=list(images), return_tensors="pt", **self.arguments)
            batch |= {name: value for name, value in features.items() if name in self.inputs}
        return batch

    def _load(self, image: Mapping[str, Any]) -> Image.Image:
        values = {name: image[name] for name in ImageReference._fields if name in image}
        return load_image(ImageReference(**values), self.folder)


def make_image_collator(
    model: Any, tokenizer: Any, folder: Path | None, build: Path, *, padding_free: bool
) -> ImageCollator:
    """Create the collator of a vision-language model.

    Args:
        model: the model.
        tokenizer: the `transformers` tokenizer.
        folder: the folder of the tokenizer, which contains the configuration of the image processor.
        build: the folder of the build.
        padding_free: whether the rows of a batch are concatenated instead of padded.

    Raises:
        UsageError: `vision_model`, if the model reads images by cross-attention; `image_processor`, if transformers
            cannot load the image processor, or if the model has another image token.
    """
    collate_text = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=padding_free)
    inputs = frozenset(inspect.signature(type(model).forward).parameters)
    if "cross_attention_mask" in inputs:
        problem = f"the model {model.config.model_type} reads images through cross-attention, which is not supported"
        raise UsageError("vision_model", problem, hint="use a model with image tokens, e.g. Qwen2.5-VL")
    processor = load_image_processor(folder) if folder else None
    if processor is None or folder is None:
        return ImageCollator(collate_text, None, {}, build, _NO_TOKEN, inputs)
    feature_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    model_ids = [value for name in _IMAGE_TOKEN_FIELDS if (value := getattr(model.config, name, None)) is not None]
    if model_ids and feature_id not in model_ids:
        problem = f"the image token of the tokenizer has the id {feature_id}, but the model expects {model_ids[0]}"
        raise UsageError("image_processor", problem, hint="use the tokenizer and the processor of the model")
    try:
        preprocess = AutoImageProcessor.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError) as error:
        problem = f"the image processor in {folder} cannot be loaded: {describe_exception(error, 500)}"
        is_missing = isinstance(error, ImportError) or "torchvision" in str(error)
        hint = "install torchvision" if is_missing else "download the files of the processor again"
        raise UsageError("image_processor", problem, hint=hint) from None
    arguments = processor.family.arguments(processor.settings)
    return ImageCollator(collate_text, preprocess, arguments, build, feature_id, inputs)


def register_mrope_hook(model: Any) -> None:
    """Make a model with multimodal RoPE (M-RoPE), e.g. Qwen2.5-VL, compute position ids within packed sequences.

    Such a model computes the positions of images for a whole sequence. In a packed sequence, the position ids of the
    batch restart at each document, so the positions are computed for each document.
    """
    base = getattr(model, "base_model", model)
    if hasattr(base, "get_rope_index"):
        base.register_forward_pre_hook(_replace_positions, with_kwargs=True)


def _replace_positions(
    base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace position ids `[1, tokens]`, which restart at each document, with position ids `[4, 1, tokens]`.

    The first axis is the position in the document, which determines the attention mask. The others are time, height and
    width.
    """
    positions, ids = kwargs.get("position_ids"), kwargs.get("input_ids")
    if positions is None or positions.dim() != 2 or ids is None or kwargs.get("attention_mask") is not None:
        return None
    types = kwargs.get("mm_token_type_ids")
    types = torch.zeros_like(ids) if types is None else types
    starts = torch.nonzero(positions[0] == 0).flatten().tolist()
    axes, next_image = list[torch.Tensor](), 0
    for start, end in pairwise([*starts, positions.shape[1]]):
        document = slice(start, end)
        count = sum(kind == 1 for kind, _ in groupby(types[0, document].tolist()))
        if count:
            grids = kwargs["image_grid_thw"][next_image : next_image + count]
            document_positions, _ = base.get_rope_index(
                ids[:, document], mm_token_type_ids=types[:, document], image_grid_thw=grids
            )
            axes.append(document_positions)
        else:
            axes.append(positions[None, :, document].expand(3, -1, -1))
        next_image += count
    return args, {**kwargs, "position_ids": torch.cat((positions[None], torch.cat(axes, dim=-1)))}


def find_language_model(model: Any) -> str:
    """Return the name of the module of a vision-language model that contains its language model."""
    decoder = model.get_decoder()
    return next(str(name) for name, module in model.named_modules() if module is decoder)


def language_model_exclusion(model: Any) -> str:
    """Return a regular expression for the names of all modules that are not in the language model."""
    return rf"(?!{re.escape(find_language_model(model))}\.).+"


def freeze_vision(model: Any) -> None:
    """Freeze the weights of a vision-language model that process images, so that only its language model is trained."""
    prefix = f"{find_language_model(model)}."
    head = model.get_output_embeddings()
    trained = {id(weight) for weight in head.parameters()} if head is not None else set()
    for name, weight in model.named_parameters():
        if not name.startswith(prefix) and id(weight) not in trained:
            weight.requires_grad_(requires_grad=False)


def copy_processor_files(source: Path, target: Path) -> None:
    """Copy the configuration of the image processor to a saved model, so that the model can be used with images."""
    for name in _PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
