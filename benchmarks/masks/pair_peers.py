"""Functions that compute the sides of preference pairs with other tools, for comparison with ftdata.

Each function takes (tokenizer, prompt, chosen, rejected, tools), and returns the chosen and the rejected side: the
token ids of prompt and answer, and for each token, whether it is in the loss. An exception means that the tool refuses
the pair. `PEERS` contains only installed tools:

    axolotl        pip install --no-deps --target LIB axolotl==0.19.0 addict==2.4.0
                   pip install --no-deps --target LIB numba==0.68.1 llvmlite==0.50.0 posthog==7.91.1 distro
                   (imported by its trainer, not used here)
                   pip install --no-deps --target TRL trl==1.9.0     (the version that axolotl 0.19.0 pins)
    llamafactory   pip install --no-deps --target LIB llamafactory==0.9.5
                   pip install --no-deps --target LIB omegaconf torchaudio==2.11.0 && rm LIB/torchaudio/lib/*.so
                   (LLaMA-Factory imports torchaudio; its CUDA library does not load beside a CPU torch. It wants
                   transformers<=5.6.0, which its switch DISABLE_VERSION_CHECK=1, set here, ignores)
    open_instruct  github.com/allenai/open-instruct at e6c3044aa6201c8bfa4573c1b03142af599e730d
                   pip install --no-deps --target LIB ray==2.60.0 beaker-py==2.8.1 wandb==0.31.0 opentelemetry-api
                       opentelemetry-sdk opentelemetry-proto opentelemetry-semantic-conventions

with LIB and the checkout on PYTHONPATH, and TRL in the environment variable `AXOLOTL_TRL`. No code of the tools is
patched. Messages contain only the keys of the pair; a data set would add missing keys with the value `None`.

ms-swift 4.6.0 is not here, because it has no training path for an arbitrary chat template:
`template_backend="jinja"` is for inference only (swift/arguments/base_args/template_args.py), and an unknown model is
trained with the template `dummy`, which prints no chat format.
"""

import copy
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

Messages = list[dict[str, Any]]
Side = tuple[list[int], list[bool]]
Peer = Callable[[Any, Messages, Messages, Messages, Any], tuple[Side, Side]]
_LONG = 1_000_000
"""A maximum length that truncates nothing."""


class _Rows(list[dict[str, Any]]):
    """Rows with the method `map` of a data set, which would add missing keys of messages with the value `None`."""

    def map(self, function: Callable[..., dict[str, Any]], fn_kwargs: dict[str, Any], **_: Any) -> "_Rows":
        return _Rows(row | function(row, **fn_kwargs) for row in self)


def axolotl(tokenizer: Any, prompt: Messages, chosen: Messages, rejected: Messages, _: Any) -> tuple[Side, Side]:
    """Return the sides of Axolotl with `rl: dpo`, `type: chat_template.default`, `chat_template: tokenizer_default`.

    The strategy makes three texts. It renders prompt and answer apart, and cuts the answer's text where its content
    first occurs. It uses only role and content, of a list only the last message, and no tools. Axolotl's trainer
    inherits the tokenization of TRL 1.9.0: it adds the EOS token to a side that does not end with it, tokenizes prompt
    and prompt + side with the special tokens of the tokenizer (a second BOS token if the template prints one: TRL calls
    a function instead of the method `_tokenize` with which Axolotl would remove it), and trains from the prompt's
    number of tokens on.
    """
    cfg = axo.DictDefault(
        rl="dpo",
        chat_template="tokenizer_default",
        sequence_len=_LONG,
        datasets=[{"path": "pairs", "type": "chat_template.default"}],
    )
    transform, _ = axo.load("chat_template.default", cfg, dataset_idx=0)
    sides = {"chosen": chosen, "rejected": rejected}
    row = {"messages": prompt} | {key: side[0] if len(side) == 1 else side for key, side in sides.items()}
    texts = transform(row, tokenizer=tokenizer)
    if not axo.drop_long(texts, cfg.rl, tokenizer, cfg.sequence_len):  # also refuses an empty text
        raise ValueError("the pair is too long")
    trainer = axo.Trainer.__new__(axo.Trainer)  # without a model
    trainer._tokenizer = tokenizer
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    (made,) = trainer._prepare_dataset(_Rows([dict(texts)]), tokenizer, settings, "train")
    count = len(made["prompt_ids"])
    first, second = (
        (made["prompt_ids"] + made[key], [False] * count + [True] * len(made[key]))
        for key in ("chosen_ids", "rejected_ids")
    )
    return first, second


def llamafactory(
    tokenizer: Any, prompt: Messages, chosen: Messages, rejected: Messages, tools: Any
) -> tuple[Side, Side]:
    """Return the sides of LLaMA-Factory with `stage: dpo`, no `template`, and ranking data in the ShareGPT format.

    Without `template`, it parses one from the chat template: strings around system, user and assistant content, which
    it tokenizes apart. It refuses several messages on a side. The data have `tags` for the OpenAI roles. Reasoning is
    written into the content between the template's thought words, as for CoT data; a template without them gets none.
    A call has the role `function_call`, in the tool format `default`.
    """
    template, tokenizer = _factory_template(tokenizer)
    convert = lf.SharegptDatasetConverter(lf.attr, lf.args)
    words = template.thought_words if isinstance(template, lf.ReasoningTemplate) else None
    said = [[_factory_message(message, words) for message in side] for side in (prompt, chosen, rejected)]
    sides = [side[0] if len(side) == 1 else side for side in said[1:]]
    row = {"messages": said[0], "chosen": sides[0], "rejected": sides[1], "tools": json.dumps(tools) if tools else ""}
    processor = lf.PairwiseDatasetProcessor(template=template, tokenizer=tokenizer, processor=None, data_args=lf.args)
    out = processor.preprocess_dataset({key: [value] for key, value in convert(row).items()})
    if not out["chosen_input_ids"]:
        raise ValueError("LLaMA-Factory drops the pair as invalid")
    first, second = (
        (out[f"{key}_input_ids"][0], [label != -100 for label in out[f"{key}_labels"][0]])
        for key in ("chosen", "rejected")
    )
    return first, second


def _factory_template(tokenizer: Any) -> tuple[Any, Any]:
    """Return the template of a tokenizer, and the tokenizer, or a copy if LLaMA-Factory adds tokens to it."""
    key = (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    if lf.last is None or lf.last[0] is not tokenizer or lf.last[1] != key:
        lf.last = None
        complete = tokenizer.chat_template and tokenizer.eos_token and tokenizer.pad_token
        own = tokenizer if complete else copy.deepcopy(tokenizer)
        lf.last = (tokenizer, key, lf.get_template_and_fix_tokenizer(own, lf.args), own)
    return lf.last[2:]


def _factory_message(message: dict[str, Any], words: tuple[str, str] | None) -> dict[str, Any]:
    """Return a message in the ShareGPT format of LLaMA-Factory."""
    role, content = message["role"], message.get("content") or ""
    if calls := message.get("tool_calls"):
        functions = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in calls]
        said = json.dumps(functions, ensure_ascii=False)
        role, content = "function_call", f"{content}<tool_call>{said}</tool_call>" if content else said
    if words and message.get("reasoning_content"):
        content = f"{words[0]}{message['reasoning_content']}{words[1]}{content}"
    return {"role": role, "content": content}


def open_instruct(
    tokenizer: Any, prompt: Messages, chosen: Messages, rejected: Messages, tools: Any
) -> tuple[Side, Side]:
    """Return the sides of open-instruct with the default transforms of its DPO script.

    These are `preference_tulu_tokenize_and_truncate_v1` (which its table maps to the function with the suffix `_1_2`)
    and `preference_tulu_filter_v1`. They render no tools and train only the last answer of each side, from the end of
    the generation prompt to the end of the text. Pairs whose span cannot be derived are dropped.
    """
    row = {"chosen": prompt + chosen, "rejected": prompt + rejected, **({"tools": tools} if tools else {})}
    tokenize, keep = (oi.TRANSFORM_FNS[name][0] for name in oi_names)
    out = tokenize(copy.deepcopy(row), tokenizer, max_seq_length=_LONG)
    if not keep(out, tokenizer):
        raise ValueError("open-instruct drops the pair")
    first, second = (
        (out[f"{key}_input_ids"].tolist(), [label != -100 for label in out[f"{key}_labels"].tolist()])
        for key in ("chosen", "rejected")
    )
    return first, second


oi_names = ("preference_tulu_tokenize_and_truncate_v1", "preference_tulu_filter_v1")


def _load_axolotl() -> Any:
    """Import Axolotl's DPO code with its own version of TRL, and leave the TRL of this process as it is."""
    folder = os.environ.get("AXOLOTL_TRL")
    saved = {name: sys.modules.pop(name) for name in [*sys.modules] if folder and name.split(".")[0] == "trl"}
    sys.path[:0] = [folder] if folder else []
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
    try:
        from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
        from axolotl.prompt_strategies.dpo import load
        from axolotl.utils.data.rl import _drop_long_sequences
        from axolotl.utils.dict import DictDefault
    except ImportError:
        return None
    finally:
        if folder:
            sys.path.remove(folder)
            for name in [*sys.modules]:
                if name.split(".")[0] == "trl":
                    del sys.modules[name]
            sys.modules.update(saved)
    return SimpleNamespace(
        Trainer=AxolotlDPOTrainer, load=load, drop_long=_drop_long_sequences, DictDefault=DictDefault
    )


def _load_factory() -> Any:
    os.environ.setdefault("DISABLE_VERSION_CHECK", "1")  # its own switch: it wants transformers<=5.6.0
    try:
        from llamafactory.data.converter import SharegptDatasetConverter
        from llamafactory.data.parser import DatasetAttr
        from llamafactory.data.processor.pairwise import PairwiseDatasetProcessor
        from llamafactory.data.template import ReasoningTemplate, get_template_and_fix_tokenizer
        from llamafactory.hparams.data_args import DataArguments
    except ImportError:
        return None
    attr = DatasetAttr("file", dataset_name="pairs")
    columns = {"messages": "messages", "chosen": "chosen", "rejected": "rejected", "tools": "tools"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    tags |= {"observation_tag": "tool", "function_tag": "function_call", "system_tag": "system"}
    attr.join({"formatting": "sharegpt", "ranking": True, "columns": columns, "tags": tags})
    return SimpleNamespace(
        SharegptDatasetConverter=SharegptDatasetConverter,
        PairwiseDatasetProcessor=PairwiseDatasetProcessor,
        ReasoningTemplate=ReasoningTemplate,
        get_template_and_fix_tokenizer=get_template_and_fix_tokenizer,
        attr=attr,
        args=DataArguments(cutoff_len=_LONG),
        last=None,
    )


def _load(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


axo, lf = _load_axolotl(), _load_factory()
oi = _load("open_instruct.dataset_transformation")
for _name in ("axolotl", "llamafactory", "open_instruct", "open_instruct.dataset_transformation"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)  # else they warn on stderr per row

PEERS: dict[str, Peer] = {}
if axo:
    PEERS["axolotl"] = axolotl
if lf:
    PEERS["llamafactory"] = llamafactory
if oi:
    PEERS["open_instruct"] = open_instruct
