"""Read an export with `IndexedDataset` of megatron-core.

No loss of Megatron-LM reads the second data set, so this script shifts the loss mask, and computes no loss.
"""

import common
import numpy as np
from megatron.core import package_info
from megatron.core.datasets.indexed_dataset import IndexedDataset


def main() -> None:
    """Read all documents of both data sets."""
    export, _, output = common.arguments()
    documents = []
    for file in sorted(export.glob("train-*-tokens.idx")):
        prefix = str(file).removesuffix("-tokens.idx")
        assert f"{export}/train-00000-tokens" in (export / "README.txt").read_text()
        tokens, masks = (IndexedDataset(f"{prefix}-{name}") for name in ("tokens", "loss_mask"))
        bounds = tokens.document_indices.tolist()
        assert bounds == list(range(len(tokens) + 1)) == masks.document_indices.tolist()
        assert np.array_equal(tokens.sequence_lengths, masks.sequence_lengths)
        for number in range(len(tokens)):
            ids, trained = tokens[number], masks[number].astype(bool)
            # The arrays are views of the mapped file, which is closed with `IndexedDataset`, so they are copied.
            documents.append((ids.copy(), np.where(trained, ids, common.IGNORE_INDEX)[1:]))
    common.save(output, documents, f"megatron-core {package_info.__version__}")


main()
