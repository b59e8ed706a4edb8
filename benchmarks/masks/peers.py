"""The mask code of other tools, each behind one function, so that a benchmark can score it.

A peer takes (tokenizer, messages, tools) and returns the ids of the conversation and, per token, whether it is trained.
Any exception it raises means that it refuses the conversation. Peers that are not installed are not in `PEERS`:

    transformers, prefix    pip install transformers==5.23.0
    trl                     pip install trl==1.16.0 torch
    axolotl                 pip install --no-deps --target DIR axolotl==0.19.0 addict==2.4.0
    unsloth                 pip install --no-deps --target DIR unsloth_zoo==2026.10.9

with DIR on PYTHONPATH. Axolotl and Unsloth also need torch, datasets and pydantic (not their GPU packages); nothing of
theirs is patched or replaced. A row of which no token is trained is refused, where the peer's trainer drops such rows.
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
    """The mask of transformers itself: what stands inside the template's `{% generation %}` blocks."""
    out = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], [bool(mask) for mask in out["assistant_masks"]]


def trl(tokenizer: Any, messages: Messages, tools: Tools) -> Example:
    """`SFTTrainer(assistant_only_loss=True)`: its own tagged copy of the template, else a refusal."""
    template = None
    if not trl_templates.has_generation_markers(tokenizer.chat_template):
        template = trl_templates.get_training_chat_template(tokenizer)
    out = trl_tokenize(tokenizer, messages, return_assistant_tokens_mask=True, chat_template=template, tools=tools)
    return _kept(out["input_ids"], [bool(mask) for mask in out["assistant_masks"]])


def axolotl(tokenizer: Any, messages: Messages, tools: Tools) -> Example:
    """`type: chat_template` with the options Axolotl documents as its defaults."""
    cfg = DictDefault(chat_template="tokenizer_default", sequence_len=1_000_000)
    options = {"roles_to_train": ["assistant"], "train_on_eos": "turn"}
    strategy = axolotl_load(tokenizer, cfg, options)
    out = strategy.tokenize_prompt({"messages": messages, "tools": tools})
    return _kept(out["input_ids"], [label != -100 for label in out["labels"]])


def unsloth(tokenizer: Any, messages: Messages, tools: Tools) -> Example:
    """`train_on_responses_only` with the markers it finds in the template by itself."""
    ids = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=True)["input_ids"]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the markers
        mask = unsloth_data.train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    return _kept(ids, [label != -100 for label in mask({"input_ids": [ids]})["labels"][0]])


def prefix(tokenizer: Any, messages: Messages, tools: Tools) -> Example:
    """The common home-made way: the token counts of the conversation's beginnings are the boundaries."""

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
    """The example, unless the peer's trainer drops or refuses it because nothing in it is trained."""
    if not any(trained):
        raise ValueError("no token is trained")
    return ids, trained


def _unsloth_data() -> Any:
    """`unsloth_zoo.dataset_utils`, by its file: the package itself refuses to be imported without `unsloth`."""
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
