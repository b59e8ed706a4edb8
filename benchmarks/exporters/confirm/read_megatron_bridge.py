"""Read an export with the data set and the collator of Megatron-Bridge, and compute losses with its loss function.

The package is not on PyPI for this format. PYTHONPATH must contain `megatron/bridge` of a checkout, and `megatron/core`
and `megatron/training` of the commit of Megatron-LM that the checkout names in `3rdparty`.
"""

import sys
import typing
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from types import ModuleType
from typing import Any

import common
import megatron
import torch
import transformers
import typing_extensions

BATCH_SIZE, LOSS_BATCHES = 2, 2

# megatron.training uses this name of Python 3.12.
typing.override = typing_extensions.override
# The `__init__` modules of these packages import all models, which need Transformer Engine and a GPU.
for name in ("megatron.bridge", "megatron.bridge.models", "megatron.bridge.data", "megatron.bridge.data.builders"):
    package = ModuleType(name)
    package.__path__ = [f"{path}{name.removeprefix('megatron').replace('.', '/')}" for path in megatron.__path__]
    sys.modules[name] = package

from megatron.bridge import package_info  # noqa: E402
from megatron.bridge.data.builders.gpt_sft import GPTSFTDatasetBuilder  # noqa: E402
from megatron.bridge.training.losses import masked_next_token_loss  # noqa: E402
from megatron.bridge.training.tokenizers.config import TokenizerConfig  # noqa: E402
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer  # noqa: E402


def compute_loss(model: torch.nn.Module, batch: dict[str, Any]) -> float:
    """Return the mean loss of a batch. The model reads each sequence of `cu_seqlens_q` separately."""
    losses = torch.zeros(batch["tokens"].shape)
    for row, bounds in enumerate(batch["cu_seqlens_q"].tolist()):
        for start, end in pairwise(bounds):
            if start < end:
                part = row, slice(start, end)
                positions = batch["position_ids"][part][None]
                logits = model(batch["tokens"][part][None], position_ids=positions, use_cache=False).logits[0]
                losses[part] = torch.nn.functional.cross_entropy(logits, batch["labels"][part], reduction="none")
    total, tokens, _ = masked_next_token_loss(batch["loss_mask"], losses, check_for_nan_in_loss=False)
    return float(total / tokens)


def main() -> None:
    """Read all rows with the data set of `ftdata_dataset.py`."""
    export, model, output = common.arguments()
    spec = spec_from_file_location("ftdata_dataset", export / "ftdata_dataset.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.dataset.finalize()
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(model)))
    data, validation, _ = GPTSFTDatasetBuilder(module.dataset, tokenizer).build()
    assert len(validation) > 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    documents, losses = [], []
    for batch in torch.utils.data.DataLoader(data, BATCH_SIZE, collate_fn=data.collate_fn):
        first = len(documents)
        for row, size in enumerate(batch["token_count"]):
            ids, labels, positions = (batch[name][row].tolist() for name in ("tokens", "labels", "position_ids"))
            mask = batch["loss_mask"][row]
            assert not mask[size:].any()
            targets = torch.where(mask.bool(), batch["labels"][row], common.IGNORE_INDEX).tolist()
            bounds = [bound for bound in batch["cu_seqlens_q"][row].unique().tolist() if bound <= size]
            for start, end in pairwise(bounds):
                assert positions[start:end] == list(range(end - start))
                assert ids[start + 1 : end] == labels[start : end - 1]
                documents.append(([*ids[start:end], labels[end - 1]], targets[start:end]))
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                losses.append(([ids for ids, _ in documents[first:]], compute_loss(loaded, batch)))
    common.save(output, documents, f"Megatron-Bridge {package_info.__version__}", losses)


main()
