"""Read an export with verl's configuration, collator and engine, and the data set class that the export contains."""

import ast
import shlex
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import hydra
import torch
from tensordict import TensorDict
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.import_utils import load_extern_object
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.utils.losses import sft_loss

BATCH_SIZE, LOSS_BATCHES = 4, 2


def read_config(export: Path) -> Any:
    """Parse the options that the export states with the configuration of verl's SFT trainer."""
    usage = ast.get_docstring(ast.parse((export / "dataset.py").read_text()))
    options = [word for line in usage.splitlines() if line.startswith("    ") for word in shlex.split(line)]
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        return hydra.compose("sft_trainer_engine", options).data


def load_rows(config: Any, paths: str) -> Any:
    """Return the data set, with the call of `create_sft_dataset` in verl/trainer/sft_trainer.py."""
    dataset_class = load_extern_object(config.custom_cls.path, config.custom_cls.name)
    return dataset_class(parquet_files=paths, tokenizer=None, config=config, processor=None, max_samples=-1)


def compute_loss(model: torch.nn.Module, config: Any, batch: dict[str, Any], *, remove_padding: bool) -> float:
    """Return the loss of verl's FSDP engine for a batch, without FSDP and the optimizer."""
    data = TensorDict(batch, batch_size=len(batch["input_ids"]))
    tensordict_utils.assign_non_tensor(
        data,
        use_remove_padding=remove_padding,
        use_dynamic_bsz=config.use_dynamic_bsz,
        max_token_len_per_gpu=config.max_token_len_per_gpu,
        pad_mode=config.pad_mode,
        temperature=1.0,
        pad_token_id=0,
        dp_size=1,
        batch_num_tokens=data["loss_mask"].sum().item(),
    )
    engine = object.__new__(FSDPEngineWithLMHead)
    engine.engine_config = SimpleNamespace(strategy="fsdp")
    engine.pad_to_length = engine.use_ulysses_sp = False
    engine.module = model
    total = 0.0
    for micro_batch in prepare_micro_batches(data)[0]:
        inputs, arguments = engine.prepare_model_inputs(micro_batch)
        outputs = engine.prepare_model_outputs(model(**inputs, use_cache=False), arguments, micro_batch, None)
        total += float(sft_loss(None, outputs, micro_batch)[0])
    return total


def main() -> None:
    """Read all batches. The loss of verl shifts the loss masks with `torch.roll`."""
    export, model, output = common.arguments()
    config = read_config(export)
    assert len(load_rows(config, config.val_files)) > 0
    rows = load_rows(config, config.train_files)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    documents, losses = [], []
    for batch in DataLoader(rows, BATCH_SIZE, collate_fn=SFTTensorCollator(config.pad_mode)):
        first = len(documents)
        ids, positions = (batch[name].unbind() for name in ("input_ids", "position_ids"))
        # The loss concatenates the rows, and rolls the tokens and the masks by one.
        masks = torch.roll(batch["loss_mask"].values(), -1).split([len(row) for row in ids])
        for row, mask, row_positions in zip(ids, masks, positions, strict=True):
            assert row_positions.tolist() == list(range(len(row)))
            assert not mask[-1], "the first token of the next document is trained"
            targets = torch.where(mask.bool(), row.roll(-1), common.IGNORE_INDEX)
            documents.append((row.tolist(), targets[:-1].tolist()))
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                loss = compute_loss(loaded, config, batch, remove_padding=len(losses) % 2 == 0)
            losses.append(([tokens for tokens, _ in documents[first:]], loss))
    common.save(output, documents, f"verl {version('verl')}", losses)


if __name__ == "__main__":
    main()
