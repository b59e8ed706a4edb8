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
"""Create a link to this export in SkyRL's cache folder, then start training with the same options:

    python {folder}/link_cache.py OPTIONS
    python -m skyrl.train.main_sft OPTIONS

OPTIONS are the options of the training. They must contain these options:

    {options}

Run the script again if the model, max_length, cache_dir or another data option changes, because the cache path depends
on these options. Set max_length to at least {longest}, or do not set it. Do not set force_recache or disable_cache.
"""

import pathlib
import sys

from skyrl.train.config.sft_config import SFTConfig
from skyrl.train.sft_trainer import _compute_cache_key

FOLDER = pathlib.Path(__file__).resolve().parent


def link(split, config):
    """Link the folder of a split into the cache, and return the path of the link."""
    key = _compute_cache_key(
        dataset_name="ftdata",
        dataset_split=split,
        model_path=config.model.path,
        max_length=config.max_length,
        messages_key=config.messages_key,
        train_on_what=config.train_on_what.value,
        tools_key=config.tools_key or None,
        system_key=config.system_key or None,
    )
    path = pathlib.Path(config.cache_dir) / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(FOLDER / split)
    return path


if __name__ == "__main__":
    settings = SFTConfig.from_cli_overrides(sys.argv[1:])
    if (settings.dataset_name, settings.dataset_split) != ("ftdata", "train"):
        sys.exit("add the options dataset_name=ftdata dataset_split=train")
    for name in {splits!r}:
        print(link(name, settings))
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
    options = "dataset_name=ftdata dataset_split=train"
    if facts.test_split:
        options += f" eval_dataset_name=ftdata eval_dataset_split={facts.test_split}"
    text = _SCRIPT.format(
        folder=facts.folder, longest=facts.longest_document, splits=list(facts.splits), options=options
    )
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
