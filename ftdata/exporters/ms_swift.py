"""ms-swift: a folder for `--cached_dataset`, with token ids and loss scales in place of text."""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote

import numpy as np
import pyarrow as pa

from ftdata.build.read_packs import Packs
from ftdata.exporters.columns import list_column, make_batch
from ftdata.exporters.files import ArrowFiles
from ftdata.exporters.formats import BuildFacts, ExportFormat
from ftdata.storage.arrow_arrays import int32_array

_TEMPLATE = '''\
"""A template that prints nothing, because the data contains complete token sequences."""

from swift.template import TemplateMeta, register_template

register_template(TemplateMeta("ftdata_tokens", prefix=[], prompt=[], chat_sep=None, suffix=[]))
'''
_COMMAND = """\
# Replace MODEL, and add the options of the training.
swift sft --model MODEL \\
    --custom_register_path {template} --template ftdata_tokens \\
    --cached_dataset {train} {evaluation}\\
    --max_length {max_length} --loss_scale default --strict true
"""


def _convert(packs: Packs, _: BuildFacts) -> pa.RecordBatch:
    bounds = packs.pack_bounds
    tokens = list_column(packs.ids, bounds)
    scales = list_column(packs.trained.astype(np.float32), bounds)
    content = pa.StructArray.from_arrays([tokens, scales], names=["token_ids", "loss_scale"])
    message = pa.StructArray.from_arrays([pa.array(["assistant"] * len(packs)), content], names=["role", "content"])
    messages = pa.ListArray.from_arrays(int32_array(np.arange(len(packs) + 1)), message)
    lengths = pa.ListArray.from_arrays(int32_array(np.arange(len(packs) + 1)), int32_array(np.diff(bounds)))
    add_eos = pa.array(np.zeros(len(packs), np.bool_))
    return make_batch({"messages": messages, "lengths": lengths, "add_eos": add_eos})


def _configure(facts: BuildFacts) -> Mapping[str, str]:
    template, train, test = (quote(f"{facts.folder}/{name}") for name in ("template.py", "train", facts.test_split))
    evaluation = f"--cached_val_dataset {test} " if facts.test_split else ""
    command = _COMMAND.format(template=template, train=train, evaluation=evaluation, max_length=facts.max_length)
    return {"template.py": _TEMPLATE, "train.sh": command}


FORMAT = ExportFormat(
    trainer="ms-swift 4.6.0",
    rows="documents",
    labels="`loss_scale` of each token, 0 or 1, not shifted",
    boundaries="one document per row; `--packing` or `--padding_free` packs them",
    padding="by the collator of ms-swift: label -100",
    source="`swift/loss_scale/base.py:115`, `swift/template/base.py:1231`",
    files=ArrowFiles(),
    convert=_convert,
    configure=_configure,
)
