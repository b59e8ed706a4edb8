"""Read an export with `DatatroveFolderDataset` of datatrove.

No data set of datatrove reads the `.ds.loss` files, so this script reads them, and computes no loss.
"""

import re
from importlib.metadata import version

import common
import numpy as np
from datatrove.utils.dataset import DatatroveFolderDataset  # noqa: F401  (for the line in `README.txt`)


def main() -> None:
    """Read all rows with the call in `README.txt`, and the loss files in the same order."""
    export, _, output = common.arguments()
    call = re.search(r"DatatroveFolderDataset\(.*\)", (export / "README.txt").read_text())
    data = eval(call.group())  # noqa: S307  (the line that the user copies)
    window = data.seq_len + 1
    files = [export / "train" / file.file_path for file in data.files]
    assert files == sorted((export / "train").glob("*.ds"))
    masks = np.concatenate([np.fromfile(f"{file}.loss", np.bool_) for file in files])
    assert len(masks) == len(data) * window
    documents = []
    for number in range(len(data)):
        row = data[number]
        ids, trained = row["input_ids"].numpy(), masks[number * window : (number + 1) * window]
        targets = common.shift(np.where(trained, ids, common.IGNORE_INDEX).tolist())
        *complete, (last_ids, last_targets) = common.split_by_positions(
            ids.tolist(), targets, row["positions"].tolist()
        )
        documents += complete
        # The last document of a row can be padding: untrained tokens 0.
        if any(last_ids) or any(target != common.IGNORE_INDEX for target in last_targets):
            documents.append((last_ids, last_targets))
    common.save(output, documents, f"datatrove {version('datatrove')}")


main()
