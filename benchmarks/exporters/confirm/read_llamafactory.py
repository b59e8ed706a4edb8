"""Read an export with LLaMA-Factory's configuration parser, loader and collator, and compute losses."""

import os
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.metadata import version

import common
import torch
import yaml

# LLaMA-Factory imports torchaudio for audio data, which is not used here.
stub = types.ModuleType("torchaudio")
stub.__spec__ = ModuleSpec("torchaudio", None)
sys.modules["torchaudio"] = stub
# LLaMA-Factory 0.9.5 rejects transformers versions after 5.6.
os.environ["DISABLE_VERSION_CHECK"] = "1"

LOSS_BATCHES = 2
SETTINGS = {
    "finetuning_type": "full",
    "use_cpu": True,
    "report_to": "none",
    "per_device_train_batch_size": 4,
    "eval_strategy": "epoch",
}
"""What a user writes in addition to `llamafactory.yaml`. The lines of the file override the batch size."""


def main() -> None:
    """Pass the lines of `llamafactory.yaml` through the parser, and read all rows with the collator of stage sft."""
    export, model, output = common.arguments()
    import transformers
    from llamafactory.data import get_dataset
    from llamafactory.data.collator import SFTDataCollatorWith4DAttentionMask
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args

    lines = yaml.safe_load((export / "llamafactory.yaml").read_text())
    folders = {"model_name_or_path": str(model), "output_dir": str(output.with_suffix(""))}
    model_arguments, data_arguments, arguments, *_ = get_train_args({**SETTINGS, **folders, **lines})
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    template = get_template_and_fix_tokenizer(tokenizer, data_arguments)
    module = get_dataset(template, model_arguments, data_arguments, arguments, "sft", tokenizer)
    assert set(module) == {"train_dataset", "eval_dataset"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    collator = SFTDataCollatorWith4DAttentionMask(
        tokenizer=tokenizer,
        template=template,
        model=loaded,
        pad_to_multiple_of=8,
        block_diag_attn=model_arguments.block_diag_attn,
        neat_packing=data_arguments.neat_packing,
        attn_implementation="sdpa",
        compute_dtype=torch.float32,
    )
    data, size = module["train_dataset"], arguments.per_device_train_batch_size
    documents, losses = [], []
    for start in range(0, len(data), size):
        batch = collator([dict(data[index]) for index in range(start, min(start + size, len(data)))])
        batch_documents = []
        for row in range(len(batch["input_ids"])):
            ids, labels = (batch[name][row].tolist() for name in ("input_ids", "labels"))
            if data_arguments.neat_packing:
                # A token attends to the tokens of its document: the mask is 0 there, and negative elsewhere.
                attends = batch["attention_mask"][row, 0] == 0
                positions = batch["position_ids"][row].tolist()
                batch_documents += _split_by_mask(ids, common.shift(labels), attends, positions)
            else:
                length = int(batch["attention_mask"][row].sum())
                assert set(labels[length:]) <= {common.IGNORE_INDEX}
                batch_documents.append((ids[:length], common.shift(labels[:length])[:-1]))
        documents += batch_documents
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                loss = float(loaded.eval()(**batch, use_cache=False).loss)
            losses.append(([ids for ids, _ in batch_documents], loss))
    common.save(output, documents, f"LLaMA-Factory {version('llamafactory')}", losses)


def _split_by_mask(
    ids: list[int], targets: list[int], attends: torch.Tensor, positions: list[int]
) -> list[tuple[list[int], list[int]]]:
    """Split a row into the blocks of a block-diagonal causal mask. Padding attends to nothing, so it is left out."""
    counts = attends.sum(1).tolist()
    end = next((index for index, count in enumerate(counts) if not attends[index, index]), len(ids))
    assert counts[:end] == [position + 1 for position in positions[:end]]
    assert set(targets[end:]) <= {common.IGNORE_INDEX}
    return common.split_by_positions(ids[:end], targets[:end], positions[:end])


if __name__ == "__main__":
    main()
