"""Read an export with LLaMA-Factory's loader and collator, and compute losses with transformers."""

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
os.environ["DISABLE_VERSION_CHECK"] = "1"

LOSS_BATCHES = 2


def main() -> None:
    """Load the data through the lines of `llamafactory.yaml`, and read all rows with the collator of stage sft."""
    export, model, output = common.arguments()
    import transformers
    from llamafactory.data import get_dataset
    from llamafactory.data.collator import SFTDataCollatorWith4DAttentionMask
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import DataArguments

    lines = yaml.safe_load((export / "llamafactory.yaml").read_text())
    names = ("tokenized_path", "cutoff_len", "packing", "neat_packing")
    data_arguments = DataArguments(**{name: lines[name] for name in names if name in lines})
    module = get_dataset(None, None, data_arguments, None, "sft", None, None)
    assert set(module) == {"train_dataset", "eval_dataset"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    collator = SFTDataCollatorWith4DAttentionMask(
        tokenizer=tokenizer,
        template=TEMPLATES["default"],
        model=loaded,
        pad_to_multiple_of=8,
        block_diag_attn=data_arguments.neat_packing,
        neat_packing=data_arguments.neat_packing,
        attn_implementation="sdpa",
        compute_dtype=torch.float32,
    )
    documents, losses = [], []
    for row in module["train_dataset"]:
        batch = collator([dict(row)])
        ids, labels = (batch[name][0].tolist() for name in ("input_ids", "labels"))
        if data_arguments.neat_packing:
            # A token attends to the tokens of its document: the mask is 0 there, and negative elsewhere.
            attends = batch["attention_mask"][0, 0] == 0
            row_documents = _split_by_mask(ids, common.shift(labels), attends, batch["position_ids"][0].tolist())
        else:
            length = int(batch["attention_mask"].sum())
            assert set(labels[length:]) <= {common.IGNORE_INDEX}
            row_documents = [(ids[:length], common.shift(labels[:length])[:-1])]
        documents += row_documents
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                losses.append(([ids for ids, _ in row_documents], float(loaded.eval()(**batch, use_cache=False).loss)))
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
