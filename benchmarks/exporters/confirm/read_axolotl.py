"""Read an export with Axolotl's configuration parser and loader, its packing sampler, and its two collators."""

import math
import os
from collections import Counter
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import common
import yaml

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

BATCH_SIZE = 4
SETTINGS = {
    "num_epochs": 1,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "optimizer": "adamw_torch",
    "dataset_num_proc": 1,
    "seed": 0,
}
"""The settings that a user adds to `axolotl.yaml`."""


def main() -> None:
    """Load the data as `axolotl train` does. The trainer class needs Triton, so its loss is not computed here."""
    export, model, output = common.arguments()
    from axolotl.cli.config import load_cfg
    from axolotl.loaders.tokenizer import load_tokenizer
    from axolotl.utils.data.sft import prepare_datasets

    lines = yaml.safe_load((export / "axolotl.yaml").read_text())
    folders = {"base_model": str(model), "output_dir": str(output.with_suffix(""))}
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**SETTINGS, **folders, **lines}))
    config = load_cfg(str(file))
    assert config.attn_decontaminates_packing, "packed documents attend to each other"
    tokenizer = load_tokenizer(config)
    data = prepare_datasets(config, tokenizer)[0]
    documents = read_packed(config, tokenizer, data)
    padded = read_padded(tokenizer, data.remove_columns(["position_ids", "length"]))
    assert count(documents) == count(padded), "with and without sample_packing, the documents differ"
    common.save(output, documents, f"Axolotl {version('axolotl')}")


def read_packed(config: Any, tokenizer: Any, data: Any) -> list[Any]:
    """Return the documents with `sample_packing: true`.

    Axolotl removes the attention mask for most attention implementations. The documents are then separated by the
    position ids, otherwise by the numbers in the mask. Both must agree.
    """
    from axolotl.monkeypatch.utils import get_unpad_data
    from axolotl.utils.collators import V2BatchSamplerDataCollatorForSeq2Seq
    from axolotl.utils.samplers.multipack import MultipackBatchSampler
    from axolotl.utils.samplers.utils import get_dataset_lengths

    sampler = MultipackBatchSampler(
        range(len(data)),
        batch_size=1,
        batch_max_len=config.micro_batch_size * config.sequence_len,
        lengths=get_dataset_lengths(data),
        bin_size=config.sample_packing_bin_size,
        group_size=config.sample_packing_group_size,
        num_processes=1,
    )
    multiple = 64 * math.ceil(config.sequence_len / 64)
    collate = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)
    documents = []
    for batch in sampler:
        packed = collate([[data[int(index)] for index in row] for row in batch])
        ids, labels, positions = (packed[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
        indices, bounds, _ = get_unpad_data(packed["attention_mask"])
        length = len(indices)
        assert indices.tolist() == list(range(length))
        assert set(labels[length:]) <= {common.IGNORE_INDEX}
        row_documents = common.split_by_positions(ids[:length], common.shift(labels[:length]), positions[:length])
        assert [len(document) for document, _ in row_documents] == [e - s for s, e in pairwise(bounds.tolist())]
        documents += row_documents
    return documents


def read_padded(tokenizer: Any, data: Any) -> list[Any]:
    """Return the documents with `sample_packing: false`."""
    from axolotl.utils.collators import DataCollatorForSeq2Seq

    collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=64)
    documents = []
    for start in range(0, len(data), BATCH_SIZE):
        batch = collate([data[index] for index in range(start, min(start + BATCH_SIZE, len(data)))])
        columns = (batch[name].tolist() for name in ("input_ids", "attention_mask", "labels"))
        for ids, mask, labels in zip(*columns, strict=True):
            length = sum(mask)
            assert set(labels[length:]) <= {common.IGNORE_INDEX}
            documents.append((ids[:length], common.shift(labels[:length])[:-1]))
    return documents


def count(documents: list[Any]) -> Counter[Any]:
    """Count equal documents."""
    return Counter((tuple(ids), tuple(targets)) for ids, targets in documents)


if __name__ == "__main__":
    main()
