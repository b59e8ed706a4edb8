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
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ftdata.errors import InputRefused, UsageError, describe_exception
from ftdata.images.processor import load_image_processor
from ftdata.images.references import load_image
from ftdata.train.dataset import to_reference
from ftdata.types import ImageReference

REFERENCES_COLUMN = "image_references"
"""The column with the images of a row during training. TRL would prepare a column with the name `images` itself."""

_TYPE_INPUTS = ("mm_token_type_ids", "token_type_ids")
"""Arguments of models for a tensor that is 1 at the tokens that the model replaces with features of images."""

_NO_TOKEN = -1
"""The id of the image token if the tokenizer has no image processor, and the rows contain only text."""

_IMAGE_TOKEN_FIELDS = ("image_token_id", "image_token_index")

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


_WORKER_ERROR = re.compile(r"^ftdata\.errors\.InputRefused: \[(?P<code>\w+)\] (?P<message>.*)", re.MULTILINE)


@dataclass(frozen=True)
class ImagePreprocessor:
    """Computes the inputs of a vision-language model for the images of a batch.

    Attributes:
        preprocess: the image processor of transformers; `None` if the tokenizer has no image processor.
        arguments: arguments for the image processor.
        folder: the folder that relative paths of images are resolved against.
        feature_id: id of the token that the model replaces with a feature of an image.
        inputs: names of the inputs that the model accepts.
    """

    preprocess: Any
    arguments: Mapping[str, Any]
    folder: Path
    feature_id: int
    inputs: frozenset[str]

    def load(self, images: Sequence[ImageReference]) -> list[Image.Image]:
        """Load images.

        Raises:
            InputRefused: `image_changed`, if the file of an image is missing or has changed since the build;
                `image_damaged`, if it cannot be decoded.
        """
        return [load_image(image, self.folder) for image in images]

    def compute_inputs(self, ids: torch.Tensor, images: Sequence[Image.Image]) -> dict[str, Any]:
        """Return the inputs for a batch.

        Args:
            ids: int64 `[texts, tokens]`, the token ids.
            images: the images of all texts, in the order of the texts.
        """
        types = (ids == self.feature_id).long()
        inputs: dict[str, Any] = {name: types for name in _TYPE_INPUTS if name in self.inputs}
        if images:
            features = self.preprocess(images=list(images), return_tensors="pt", **self.arguments)
            inputs |= {name: value for name, value in features.items() if name in self.inputs}
        return inputs


@dataclass(frozen=True)
class ImageCollator:
    """Makes batches of rows with images.

    Attributes:
        collate_text: makes a batch of the tokens and labels of rows.
        preprocessor: computes the inputs for the images.
    """

    collate_text: Callable[[list[dict[str, Any]]], dict[str, Any]]
    preprocessor: ImagePreprocessor

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Load the images of the rows, and make a batch.

        Raises:
            InputRefused: as in `ImagePreprocessor.load`.
        """
        images = [to_reference(image) for row in rows for image in row.get(REFERENCES_COLUMN) or ()]
        return self.collate(rows, self.preprocessor.load(images))

    def collate(self, rows: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> dict[str, Any]:
        """Make a batch of rows with the given images, which are in the order of the rows."""
        texts = [{name: value for name, value in row.items() if name != REFERENCES_COLUMN} for row in rows]
        batch = dict(self.collate_text(texts))
        return batch | self.preprocessor.compute_inputs(batch["input_ids"], images)


def make_image_collator(
    model: Any, tokenizer: Any, folder: Path | None, build: Path, *, padding_free: bool
) -> ImageCollator:
    """Create the collator of a vision-language model.

    Args:
        model, tokenizer, folder, build: as in `make_image_preprocessor`.
        padding_free: whether the rows of a batch are concatenated instead of padded.

    Raises:
        UsageError: as in `make_image_preprocessor`.
    """
    collate_text = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=padding_free)
    return ImageCollator(collate_text, make_image_preprocessor(model, tokenizer, folder, build))


def make_image_preprocessor(model: Any, tokenizer: Any, folder: Path | None, build: Path) -> ImagePreprocessor:
    """Create the preprocessor of a vision-language model.

    Args:
        model: the model, possibly with an adapter.
        tokenizer: the `transformers` tokenizer.
        folder: the folder of the tokenizer, which contains the configuration of the image processor.
        build: the folder of the build.

    Raises:
        UsageError: `vision_model`, if the model reads images by cross-attention; `image_processor`, if transformers
            cannot load the image processor, or if the model has another image token.
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = frozenset(inspect.signature(type(model).forward).parameters)
    if "cross_attention_mask" in inputs:
        problem = f"the model {model.config.model_type} reads images through cross-attention, which is not supported"
        raise UsageError("vision_model", problem, hint="use a model with image tokens, e.g. Qwen2.5-VL")
    processor = load_image_processor(folder) if folder else None
    if processor is None or folder is None:
        return ImagePreprocessor(None, {}, build, _NO_TOKEN, inputs)
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
    return ImagePreprocessor(preprocess, arguments, build, feature_id, inputs)


def find_worker_error(error: BaseException) -> InputRefused | None:
    """Return the error of an image that a worker process of the data loader raised.

    PyTorch raises a `RuntimeError` with the traceback of the worker as its text.
    """
    match = _WORKER_ERROR.search(str(error))
    if match is None:
        return None
    message, _, hint = match["message"].strip().partition(". Fix: ")
    return InputRefused(match["code"], message, hint=hint)


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
    for name in PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
