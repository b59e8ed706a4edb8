"""Read an export from SkyRL's cache of tokenized data, with its collators, and compute losses with its model."""

import ast
import runpy
import sys
import types
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import common
import torch
import transformers.modeling_utils
import typing_extensions

# SkyRL uses typing.TypedDict, which pydantic rejects before Python 3.12.
typing.TypedDict = typing_extensions.TypedDict
# The module of the model imports two functions of flash-attn, which it calls only with remove_microbatch_padding=true.
# transformers must not see the empty modules, so its own check for flash-attn runs before.
assert not transformers.utils.is_flash_attn_2_available()
PADDING = types.ModuleType("flash_attn.bert_padding")
PADDING.pad_input = PADDING.unpad_input = None
sys.modules["flash_attn"] = types.ModuleType("flash_attn")
sys.modules["flash_attn.bert_padding"] = PADDING
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry  # noqa: E402
from skyrl.backends.skyrl_train.workers.model_wrapper import HFModelWrapper  # noqa: E402

del sys.modules["flash_attn"], sys.modules["flash_attn.bert_padding"]
from skyrl.train import sft_trainer  # noqa: E402
from skyrl.train.config.sft_config import SFTConfig, validate_sft_cfg  # noqa: E402
from skyrl.train.dataset.collators import DefaultCollator, PackedDataCollator  # noqa: E402

BATCH_SIZE, LOSS_BATCHES = 4, 2
CAPACITY = 4096


def load_rows(export: Path, model: Path, cache: Path) -> list[dict[str, Any]]:
    """Link the export into the cache with the script that it contains, and load it with the options that it states."""
    script = export / "link_cache.py"
    usage = ast.get_docstring(ast.parse(script.read_text())).splitlines()
    stated = next(line for line in usage if line.strip().startswith("dataset_name=")).split()
    # The cache key contains the names of the columns with tools and system prompts, which have defaults.
    options = [f"model.path={model}", f"cache_dir={cache}", "strategy=fsdp", "remove_microbatch_padding=false", *stated]
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name="__main__")
    config = SFTConfig.from_cli_overrides(options)
    validate_sft_cfg(config)
    # The constructor requires Ray and GPUs; the methods that load data read only the configuration.
    trainer = object.__new__(sft_trainer.SFTTrainer)
    trainer.sft_cfg = config
    assert len(trainer.load_eval_dataset()) > 0
    return trainer.load_dataset()


def apply_mask(tokens: list[int], trained: list[float]) -> list[int]:
    """Return the target of each token, except the last."""
    return [token if flag else common.IGNORE_INDEX for token, flag in zip(tokens[1:], trained, strict=True)]


def check_packed(rows: list[dict[str, Any]], tokenizer: Any, expected: list[tuple[list[int], list[int]]]) -> None:
    """Check that the collator of `use_sequence_packing` keeps all documents and their targets."""
    collator = PackedDataCollator(
        tokenizer,
        CAPACITY,
        tp_size=2,
        pp_size=1,
        cp_size=1,
        dp_size=1,
        batch_size=len(rows),
        micro_train_batch_size_per_gpu=1,
    )
    batch = collator(rows, batch_size=len(rows))
    documents, trained_count = [], 0
    for ids, mask, lengths in zip(
        batch["sequences"].tolist(), (batch["loss_mask"] > 0).tolist(), batch["sub_seq_lengths"].tensors, strict=True
    ):
        start = 0
        for length in lengths.tolist():
            tokens, trained = ids[start : start + length], mask[start : start + length - 1]
            documents.append((tokens, apply_mask(tokens, trained)))
            trained_count += sum(trained)
            # The collator pads each document to a multiple of tp_size.
            start += length + length % 2
    assert sorted(documents) == sorted(expected)
    assert trained_count == int((batch["loss_mask"] > 0).sum()), "a token between two documents is trained"


def main() -> None:
    """Read all batches."""
    export, model, output = common.arguments()
    rows = load_rows(export, model, output.with_suffix(".cache"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    collator = DefaultCollator(tokenizer, micro_train_batch_size_per_gpu=BATCH_SIZE)
    wrapper = HFModelWrapper(str(model), bf16=False).eval()
    cross_entropy = PolicyLossRegistry.get("cross_entropy")
    documents, losses = [], []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = collator(rows[start : start + BATCH_SIZE], batch_size=BATCH_SIZE)
        for ids, attention, mask in zip(
            *(batch[name].tolist() for name in ("sequences", "attention_mask", "loss_mask")), strict=True
        ):
            tokens = ids[len(ids) - sum(attention) :]
            # The last values of the mask belong to the last tokens of the left-padded sequence.
            trained = mask[-(len(tokens) - 1) :]
            assert not any(mask[: -(len(tokens) - 1)])
            documents.append((tokens, apply_mask(tokens, trained)))
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                log_probs = wrapper(batch["sequences"], batch.metadata["response_length"], batch["attention_mask"])
                loss, _ = cross_entropy(log_probs, None, None, config=None, loss_mask=batch["loss_mask"])
            losses.append(([tokens for tokens, _ in documents[start:]], float(loss)))
    check_packed(rows, tokenizer, documents)
    common.save(output, documents, f"SkyRL {version('skyrl')}", losses)


if __name__ == "__main__":
    main()
