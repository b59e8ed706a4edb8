"""Functions that compute the masks of other tools for conversations with images, for comparison with ftdata.

Each function takes (tokenizer, placeholder, feature, ids), where `placeholder` is the text that the template prints for
an image and `feature` is the image token, and returns for each token whether it is trained. The ids are the correct
ids, because the collators of these tools use the processors of transformers. An exception means that the tool refuses
the conversation. `peers.py` explains the installation; `IMAGE_PEERS` contains only installed tools.
"""

import contextlib
import io
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from peers import unsloth_data

try:
    import torch
    from axolotl.processing_strategies import get_processing_strategy
except ImportError:
    get_processing_strategy = None

Ids = list[int]
ImagePeer = Callable[[Any, str, str, Ids], list[bool]]

_AXOLOTL_TEMPLATES = {
    "<|image_pad|>": ("qwen2_vl",),
    "<start_of_image>": ("gemma3",),
    "[IMG]": ("pixtral",),
    "<|image|>": ("llama3_2_vision", "gemma4", "llama4"),
    "<image>": ("llava",),
}
"""Placeholder -> the settings `chat_template` of Axolotl for models with this placeholder."""


def trl(tokenizer: Any, placeholder: str, feature: str, ids: Ids) -> list[bool]:  # noqa: ARG001  (the type of all)
    """Return the mask of TRL's collator for images, which labels all tokens except padding."""
    return [True] * len(ids)


def axolotl(tokenizer: Any, placeholder: str, feature: str, ids: Ids) -> list[bool]:
    """Return the mask of Axolotl's processing strategy for the model, with default options.

    If models of several families print the placeholder, the first strategy that trains a token is used.
    """
    processor = SimpleNamespace(tokenizer=tokenizer, image_token=feature)
    trained = [False] * len(ids)
    for name in _AXOLOTL_TEMPLATES.get(placeholder, ()):
        strategy = get_processing_strategy(processor, tokenizer.chat_template, name)
        trained = [label != -100 for label in strategy.process_labels(torch.tensor([ids]))[0].tolist()]
        if any(trained):
            break
    return _check(trained)


def unsloth(tokenizer: Any, placeholder: str, feature: str, ids: Ids) -> list[bool]:  # noqa: ARG001
    """Return the mask of Unsloth's collator for images with `train_on_responses_only`; image tokens are not trained."""
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the markers that it detects in the template
        mask = unsloth_data.train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    labels = mask({"input_ids": [ids]})["labels"][0]
    image_token = tokenizer.convert_tokens_to_ids(feature)
    return _check([label not in (-100, image_token) for label in labels])


def _check(trained: list[bool]) -> list[bool]:
    """Return the mask. Raise an error if no token is trained, which the tools report."""
    if not any(trained):
        raise ValueError("no token is trained")
    return trained


logging.getLogger("axolotl").addHandler(logging.NullHandler())  # else it warns on stderr per row

IMAGE_PEERS: dict[str, ImagePeer] = {"trl": trl}
if get_processing_strategy:
    IMAGE_PEERS["axolotl"] = axolotl
if unsloth_data:
    IMAGE_PEERS["unsloth"] = unsloth
