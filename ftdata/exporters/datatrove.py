"""datatrove and nanotron: `.ds` files with `.ds.index` and `.ds.loss`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import token_columns
from ftdata.exporters.formats import BuildFacts, ExportFormat
from ftdata.storage import disk

_LINES = """\
Read each row with datatrove:

    from datatrove.utils.dataset import DatatroveFolderDataset
    DatatroveFolderDataset("{folder}/train", seq_len={window}, return_positions=True, token_size=4)

All rows have {longest} tokens, so no document is split across rows. Shorter rows are padded with token id 0. The
padding is a separate document and is not trained. Element i of a `.ds.loss` file is 1 if token i is trained.
"""


@dataclass(frozen=True)
class TokenizedFiles:
    """Files that `DatatroveFolderDataset` reads, written by `TokenizedFile` of datatrove."""

    def write(self, folder: Path, batches: Iterator[pa.RecordBatch]) -> None:
        """Write `data.ds`, `data.ds.index` and `data.ds.loss`."""
        from datatrove.pipeline.tokens.tokenizer import TokenizedFile

        file = TokenizedFile(str(folder), "data.ds", save_loss_metadata=True, token_size=4)
        for batch in batches:
            ids, trained = (batch[name].values.to_numpy() for name in ("ids", "trained"))
            # One call per batch is much faster than `TokenizedFile.write`, which receives lists of one document.
            file.write_bytes(ids.astype("<u4").tobytes(), batch["ids"].offsets.to_pylist()[1:])
            file.write_loss_bytes(trained.astype(np.bool_).tobytes())
        file.close()

    def collect(self, target: Path, split: str, parts: Sequence[Path]) -> None:
        """Move the files of each part to the folder of the split."""
        disk.mkdir(target / split)
        for number, part in enumerate(parts):
            for suffix in (".ds", ".ds.index", ".ds.loss"):
                disk.link(part / f"data{suffix}", target / split / f"{number:05d}{suffix}")


def _convert(packs: Packs, facts: BuildFacts) -> pa.RecordBatch:
    """Return the columns `ids` and `trained` with one row per document. All packs have the same number of tokens."""
    padded = packs.add_padding_documents(facts.longest_pack).split_documents()
    return token_columns(padded, ids=padded.ids, trained=padded.trained.astype(np.int8))


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    longest = facts.longest_pack
    return {"README.txt": _LINES.format(folder=facts.folder, window=longest - 1, longest=longest)}


FORMAT = ExportFormat(
    trainer="datatrove 0.10.1",
    rows="packs",
    labels="`.ds.loss`: a byte for each token, not shifted",
    boundaries="`.ds.index`; each row is padded to the longest row",
    padding="in the export: token id 0, not trained",
    source="`datatrove/utils/dataset.py`; the trainer must read `.ds.loss`",
    files=TokenizedFiles(),
    convert=_convert,
    package="datatrove",
    configure=_configure,
)
