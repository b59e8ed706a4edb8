"""Read the configuration of a model's processor, and compute the text of an image from its size."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ftdata.errors import BadRow, UsageError
from ftdata.images.families import ImageFamily, Settings, Tokens, image_families

_MAX_SIZES = 1 << 14
"""Maximum number of image sizes whose texts are cached."""


class ImageText(NamedTuple):
    """The text of an image, in which a repeated token for a feature occurs once.

    Attributes:
        text: the text.
        repeats: how often each token for a feature is repeated.
    """

    text: str
    repeats: tuple[int, ...]


@dataclass(frozen=True)
class ImageProcessor:
    """An image processor with its settings. It computes the text of an image from the size of the image.

    Attributes:
        family: the formula, and the settings that it reads.
        settings: the settings of the processor and of its image processor.
        tokens: the texts of the tokens that the formula prints.
    """

    family: ImageFamily
    settings: Settings
    tokens: Tokens

    @property
    def placeholder(self) -> str:
        """The text that the chat template prints for each image."""
        return self.tokens[self.family.placeholder]

    @property
    def image_token(self) -> str:
        """The token that the model replaces with a feature of an image."""
        return self.tokens[self.family.feature]

    def expand(self, width: int, height: int) -> str:
        """Return the text that replaces the placeholder of an image.

        Args:
            width, height: the size of the image in pixels, after it is rotated as its EXIF data says.

        Raises:
            BadRow: `image_ratio`, if the processor does not accept the aspect ratio.
            UsageError: `image_processor`, if a setting is missing or invalid.
        """
        try:
            return self.family.expand(width, height, self.settings, self.tokens)
        except BadRow:
            raise
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            processors = " or ".join(self.family.processors)
            reason = f"{error} is missing" if isinstance(error, LookupError) else str(error)
            reason = "a size is 0" if isinstance(error, ZeroDivisionError) else reason
            problem = f"the settings in preprocessor_config.json are invalid for {processors}: {reason}"
            raise UsageError("image_processor", problem, hint="correct the settings of the processor") from None

    @cached_property
    def _texts(self) -> dict[tuple[int, int], ImageText]:
        """A cache of `collapse_repeats`. The keys are sizes of images."""
        return {}

    def collapse_repeats(self, width: int, height: int) -> ImageText:
        """Return the text of an image as `expand` does, but with one image token in place of consecutive image tokens.

        Tokenizing thousands of repeated tokens is slow.
        """
        if (text := self._texts.get((width, height))) is None:
            feature, repeats = self.image_token, list[int]()

            def join(match: re.Match[str]) -> str:
                repeats.append(len(match.group()) // len(feature))
                return feature

            joined = re.sub(f"(?:{re.escape(feature)})+", join, self.expand(width, height))
            text = ImageText(joined, tuple(repeats))
            if len(self._texts) < _MAX_SIZES:
                self._texts[width, height] = text
        return text

    def count_features(self, width: int, height: int) -> int:
        """Return how many features of an image the model reads: how often `image_token` occurs in its text."""
        return sum(self.collapse_repeats(width, height).repeats)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that determines the text of an image: 64 hexadecimal digits."""
        content = [self.family.processors, dict(self.settings), dict(self.tokens)]
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_image_processor(folder: Path) -> ImageProcessor | None:
    """Read the image processor of a model. Return `None` if the model has no image processor.

    The settings are in `processor_config.json` or `preprocessor_config.json`, and the tokens in these files or in
    `tokenizer_config.json`. Settings that are missing have the defaults of the processor's class.

    Args:
        folder: a folder with the files of the model's tokenizer.

    Raises:
        UsageError: `image_processor`, if the processor belongs to no known family, or a setting is missing or invalid.
    """
    processor_config = _read_json(folder / "processor_config.json")
    image_config = processor_config.get("image_processor") or _read_json(folder / "preprocessor_config.json")
    if not image_config:
        return None
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    configs = (processor_config, image_config, tokenizer_config)
    name = next((str(config["processor_class"]) for config in configs if config.get("processor_class")), "")
    # The families of ftdata come first, so that plug-ins are imported only for other processors.
    families = map(image_families.get, image_families.names())
    family = next((family for family in families if name in family.processors), None)
    if family is None:
        all_families = map(image_families.get, image_families.names())
        supported = ", ".join(sorted(processor for family in all_families for processor in family.processors))
        problem = f"the processor {name} in {folder} is not supported" if name else f"{folder} names no processor_class"
        raise UsageError(
            "image_processor", problem, hint=f"use the files of a model with one of the processors {supported}"
        )
    settings = {
        **_read_settings(family.image_settings, image_config),
        **_read_settings(family.processor_settings, processor_config),
    }
    _check_settings(family, settings, image_config, folder)
    missing = [key for key, value in settings.items() if value is None and key not in ("min_pixels", "max_pixels")]
    if missing:
        problem = f"the configuration of the image processor in {folder} has no {' and no '.join(missing)}"
        raise UsageError("image_processor", problem, hint="add the setting to processor_config.json")
    extra_tokens = tokenizer_config.get("extra_special_tokens")
    named_tokens = extra_tokens if isinstance(extra_tokens, Mapping) else {}
    tokens = {
        token: _read_token((processor_config, tokenizer_config, named_tokens), token) or text
        for token, text in family.tokens.items()
    }
    return ImageProcessor(family, settings, tokens)


def _check_settings(family: ImageFamily, settings: Settings, image_config: Mapping[str, Any], folder: Path) -> None:
    """Check that sizes are numbers, and that the formula applies to an image processor with these settings.

    Raises:
        UsageError: `image_processor`.
    """
    hint = "correct the setting in preprocessor_config.json or processor_config.json"
    if image_config.get("do_resize") is False and "do_resize" not in family.image_settings:
        problem = f"the image processor in {folder} does not resize images (do_resize: false), which is not supported"
        raise UsageError("image_processor", problem, hint=hint)
    defaults = {**family.image_settings, **family.processor_settings}
    for key, value in settings.items():
        is_number = isinstance(defaults[key], int | float) and not isinstance(defaults[key], bool)
        numbers = value.values() if isinstance(value, Mapping) else [value] if is_number else []
        if not all(number is None or (isinstance(number, int | float) and number >= 0) for number in numbers):
            setting = f"the setting {key} of the image processor in {folder}"
            problem = f"{setting} is {value!r:.80}, expected a number of at least 0"
            raise UsageError("image_processor", problem, hint=hint)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        problem = f"{path} is not valid JSON: {error}"
        raise UsageError("image_processor", problem, hint="download the file again") from None
    return content if isinstance(content, dict) else {}


def _read_settings(defaults: Settings, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: default if config.get(key) is None else _read_size(config[key], default)
        for key, default in defaults.items()
    }


def _read_size(value: Any, default: Any) -> Any:
    """Convert a size that is one number, as in older configurations, to the form of the class's default."""
    if not isinstance(default, Mapping) or isinstance(value, Mapping):
        return value
    return dict.fromkeys(default, value)


def _read_token(configs: tuple[Mapping[str, Any], ...], name: str) -> str | None:
    """Return the text of a token. Configurations contain the text, or an object with the text."""
    for config in configs:
        value = config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text:
            return text
    return None
