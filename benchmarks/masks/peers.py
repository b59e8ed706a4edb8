"""Functions that compute masks with other tools, for comparison with ftdata.

Each function takes (tokenizer, messages, tools), and returns the token ids and, for each token, whether it is
trained. An exception means that the tool refuses the conversation. `PEERS` contains only installed tools:

    transformers, prefix    pip install transformers==5.23.0
    trl                     pip install trl==1.16.0 torch
    axolotl                 pip install --no-deps --target DIR axolotl==0.19.0 addict==2.4.0
    unsloth                 pip install --no-deps --target DIR unsloth_zoo==2026.10.9

with DIR on PYTHONPATH. Axolotl and Unsloth also need torch, datasets and pydantic, but not their GPU packages. No
code of the tools is patched. If the trainer of a tool drops rows without a trained token, such a row counts as
refused.
"""

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

try:
    from trl import chat_template_utils as trl_templates
    from trl.data_utils import _tokenize as trl_tokenize
except ImportError:
    trl_templates = None

try:
    from axolotl.prompt_strategies.chat_template import load as axolotl_load
    from axolotl.utils.dict import DictDefault
except ImportError:
    axolotl_load = None

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
Example = tuple[list[int], list[bool]]
Peer = Callable[[Any, Messages, Tools], Example]


def transformers(tokenizer: Any, messages: Messages, tools: Tools) -> Example:
    """Return the mask of transformers: the text inside the `{% generation %}` blocks of the template."""
    out = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], [bool(mask) for mask in out["assistant_masks"]]


def trl(tokenizer: Any, messages: Messages, tools: Tools) -> Example:
    """Return the mask of `SFTTrainer(assistant_only_loss=True)`, which refuses templates that TRL does not know."""
    template = None
    if not trl_templates.has_generation_markers(tokenizer.chat_template):
        template = trl_templates.get_training_chat_template(tokenizer)
    out = trl_tokenize(tokenizer, messages, return_assistant_tokens_mask=True, chat_template=template, tools=tools)
    return _kept(out["input_ids"], [bool(mask) for mask in out["assistant_masks"]])


def axolotl(tokenizer: Any, messages: Messages, tools: Tools) -> Example:
    """Return the mask of Axolotl's `type: chat_template` with the documented default options."""
    cfg = DictDefault(chat_template="tokenizer_default", sequence_len=1_000_000)
    options = {"roles_to_train": ["assistant"], "train_on_eos": "turn"}
    strategy = axolotl_load(tokenizer, cfg, options)
    out = strategy.tokenize_prompt({"messages": messages, "tools": tools})
    return _kept(out["input_ids"], [label != -100 for label in out["labels"]])


def unsloth(tokenizer: Any, messages: Messages, tools: Tools) -> Example:
    """Return the mask of Unsloth's `train_on_responses_only` with the markers that it detects in the template."""
    ids = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the markers
        mask = unsloth_data.train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    return _kept(ids, [label != -100 for label in mask({"input_ids": [ids]})["labels"][0]])


def prefix(tokenizer: Any, messages: Messages, tools: Tools) -> Example:
    """Return a mask from the token counts of rendered prefixes, a common method in training scripts."""

    def ids(count: int, *, prompt: bool = False) -> list[int]:
        out = tokenizer.apply_chat_template(
            messages[:count], tools=tools, add_generation_prompt=prompt, tokenize=True, return_dict=True
        )
        return list(out["input_ids"])

    whole = ids(len(messages))
    trained = [False] * len(whole)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            turn = range(len(ids(i, prompt=True)), min(len(ids(i + 1)), len(whole)))
            trained = [old or at in turn for at, old in enumerate(trained)]
    return whole, trained


def _kept(ids: list[int], trained: list[bool]) -> Example:
    """Return the example. Raise an error if the trainer of the tool drops examples without trained tokens."""
    if not any(trained):
        raise ValueError("no token is trained")
    return ids, trained


def _unsloth_data() -> Any:
    """Import `unsloth_zoo.dataset_utils` from its file, because the package cannot be imported without `unsloth`."""
    found = importlib.util.find_spec("unsloth_zoo")
    if found is None or not found.submodule_search_locations:
        return None
    path = Path(found.submodule_search_locations[0], "dataset_utils.py")
    spec = importlib.util.spec_from_file_location("unsloth_dataset_utils", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError:
        return None
    return module


logging.getLogger("axolotl").addHandler(logging.NullHandler())  # else it warns on stderr per row
unsloth_data = _unsloth_data()

PEERS: dict[str, Peer] = {"transformers": transformers, "prefix": prefix}
if trl_templates:
    PEERS["trl"] = trl
if axolotl_load:
    PEERS["axolotl"] = axolotl
if unsloth_data:
    PEERS["unsloth"] = unsloth
