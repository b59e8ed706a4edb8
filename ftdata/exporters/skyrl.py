"""SkyRL: tokenized documents in the layout of its cache."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import list_column, make_batch, ones
from ftdata.exporters.files import ArrowFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat
from ftdata.storage.arrow_arrays import int32_array

_SCRIPT = '''\
"""Link this export to the place where SkyRL looks for tokenized data, then start the training:

python {folder}/link_cache.py model.path=MODEL max_length={longest} cache_dir=CACHE
"""

import pathlib
import sys

from skyrl.train.sft_trainer import _compute_cache_key

FOLDER = pathlib.Path(__file__).parent


def link(split, options):
    """Link the folder of a split into the cache, and return the name of the link."""
    defaults = {{"dataset_name": "ftdata", "dataset_split": split, "model_path": options["model.path"]}}
    names = {{"messages_key": "messages", "train_on_what": "all_assistant_messages", "tools_key": None}}
    key = _compute_cache_key(**defaults, **names, max_length=int(options["max_length"]), system_key=None)
    path = pathlib.Path(options["cache_dir"]) / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(FOLDER.resolve() / split)
    return path


if __name__ == "__main__":
    settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
    for name in {splits!r}:
        print(link(name, settings))
    print("set dataset_name=ftdata dataset_split=train train_on_what=all_assistant_messages max_length={longest}")
'''


def _convert(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    bounds = packs.pack_bounds
    is_first = np.zeros(len(packs.ids), np.bool_)
    is_first[packs.token_bounds[:-1]] = True
    return make_batch(
        {
            "input_ids": list_column(packs.ids, bounds),
            "attention_mask": list_column(ones(packs), bounds),
            "num_actions": int32_array(np.diff(bounds) - 1),
            "loss_mask": list_column(packs.trained[~is_first].astype(np.int32), bounds - np.arange(len(packs) + 1)),
        }
    )


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    text = _SCRIPT.format(folder=facts.folder, longest=facts.longest[1], splits=list(facts.splits))
    return {"link_cache.py": text}


FORMAT = ExportFormat(
    trainer="SkyRL 0.3.0",
    rows="documents",
    labels="`loss_mask` of all tokens after the first (`num_actions` values)",
    boundaries="one document per row",
    padding="by the collator of SkyRL, on the left: loss mask 0",
    source="`skyrl/train/sft_trainer.py:693`",
    files=ArrowFiles(),
    convert=_convert,
    configure=_configure,
)
