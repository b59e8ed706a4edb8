"""Tinker: JSON Lines with the fields of a `Datum`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import list_column, make_batch
from ftdata.exporters.files import JsonLines
from ftdata.exporters.formats import BuildFacts, ExportFormat

_SCRIPT = '''\
"""Functions that load the data for `TrainingClient.forward_backward(data, "cross_entropy")`."""

import json
import pathlib

import numpy as np
import tinker

FOLDER = pathlib.Path(__file__).parent


def load(split="train"):
    """Yield a `tinker.Datum` for each document. Targets and weights are shifted: target i follows token i."""
    with open(FOLDER / f"{{split}}.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, file):
            targets = np.array(row["target_tokens"], np.int64)
            weights = np.array(row["weights"], np.float32)
            yield tinker.Datum(
                model_input=tinker.ModelInput.from_ints(row["input_tokens"]),
                loss_fn_inputs={{"target_tokens": targets, "weights": weights}},
            )
'''


def _convert(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    """Return the tokens without the last token of each document, and the tokens and weights without the first."""
    is_first, is_last = np.zeros((2, len(packs.ids)), np.bool_)
    is_first[packs.token_bounds[:-1]] = True
    is_last[packs.token_bounds[1:] - 1] = True
    bounds = packs.pack_bounds - np.arange(len(packs) + 1)
    return make_batch(
        {
            "input_tokens": list_column(packs.ids[~is_last], bounds),
            "target_tokens": list_column(packs.ids[~is_first], bounds),
            "weights": list_column(packs.trained[~is_first].astype(np.float32), bounds),
        }
    )


def _configure(_: BuildFacts) -> Mapping[str, str]:
    return {"ftdata_tokens.py": _SCRIPT.format()}


FORMAT = ExportFormat(
    trainer="tinker 0.38.0",
    rows="documents",
    labels="`target_tokens` and `weights`, shifted: element i is for token i + 1",
    boundaries="one document per row",
    padding="none",
    source="the loss `cross_entropy` multiplies by `weights`",
    files=JsonLines(),
    convert=_convert,
    configure=_configure,
)
