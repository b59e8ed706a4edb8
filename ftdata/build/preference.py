"""Build a data set of rated answers, for DPO, reward models and KTO."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftdata.build import remote
from ftdata.build.dataset import load_build, write_build
from ftdata.errors import UsageError, check_choice
from ftdata.options import TASKS

if TYPE_CHECKING:
    import datasets


def build_preference_dataset(
    data: Any,
    tokenizer: Any,
    template: str | Path | None = None,
    *,
    output_dir: str | Path | None = None,
    task: str = "preference",
    **options: Any,
) -> datasets.DatasetDict:
    """Build a data set of preference pairs, or of answers that are labeled as desirable or undesirable (KTO).

    Each row of a data set of pairs has the columns `chosen` and `rejected`, which contain a text or messages, and
    optionally `prompt`. In both sides, the same tokens are trained as in supervised fine-tuning on that side, but only
    from the first message on in which the sides differ. Steps that reject, truncate, filter or split rows act on the
    pair.

    Each row for KTO is a row for `build_sft_dataset` with the column `label`, which is true if the answer is desirable.
    The last answer, or the completion, is trained.

    Args:
        data: as for `build_sft_dataset`.
        tokenizer: as for `build_sft_dataset`.
        template: as for `build_sft_dataset`.
        output_dir: as for `build_sft_dataset`.
        task: `"preference"` (or `"dpo"`, `"reward"`) for pairs, `"kto"` for labeled answers.
        options: the other options of `build_sft_dataset`, except `packing`.

    Returns:
        A `datasets.DatasetDict` with `"train"` (and `"test"`), and the `Report` as `.report`. Each row is a pair with
        the int32 lists `prompt_ids`, `chosen_ids`, `chosen_labels`, `rejected_ids` and `rejected_labels`. A side
        consists of the prompt followed by its ids. The names of the ids are those of TRL's collators. A label is the
        token's own id (not shifted), or -100; tokens of the prompt are never trained. If the data has the column
        `margin`, the rows have it, too (float32). Rows for KTO have the columns of `build_sft_dataset`, and `label`.

    Raises:
        UsageError: `packing` is given, or `task` is not one of these.
        FtdataError: as for `build_sft_dataset`. Rows that are not pairs are bad rows.

    >>> from ftdata.testing import byte_tokenizer
    >>> rows = [{"prompt": "2+2?", "chosen": "4", "rejected": "22"}]
    >>> ds = build_preference_dataset(rows, byte_tokenizer(), "chatml")
    >>> print(ds.report)
    rows     1 read = 1 built + 0 rejected
    tokens   53 in = 53 kept + 0 cut + 0 in rejected rows
    train    1 pair, 53 tokens, 9.4% trained
    >>> pair = ds["train"][0]
    >>> len(pair["prompt_ids"]), pair["chosen_labels"], pair["rejected_labels"]
    (23, [52, 257, -100], [50, 50, 257, -100])
    """
    if task == "sft":
        raise UsageError("task", "task='sft' has no ratings of answers", hint="use build_sft_dataset")
    check_choice("task", task, [name for name, data in TASKS.items() if data != "sft"])
    with tempfile.TemporaryDirectory() as scratch:
        target = output_dir if output_dir is not None else Path(scratch) / "build"
        report = write_build(data, tokenizer, target, template=template, task=task, **options)
        return load_build(remote.local_build(target).resolve(), report, in_memory=output_dir is None)
