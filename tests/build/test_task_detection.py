"""The task that ftdata detects in the data, and data in which conversations and pairs are mixed."""

import json
import logging
import subprocess
import sys

import pytest

from ftdata import build_preference_dataset, build_sft_dataset, preview, stats
from ftdata.build.dataset import write_build
from ftdata.errors import BadRows, UsageError
from ftdata.schemas import detect_task
from ftdata.testing import byte_tokenizer
from ftdata.types import Reject, Row, Source

CONVERSATION = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad"}
RANKED = {"prompt": "q", "completions": ["good", "bad"]}
LABELED = {"prompt": "q", "completion": "a", "label": False}
SOURCE = Source("data.jsonl", 0)


@pytest.mark.parametrize(
    ("data", "columns", "expected"),
    [
        (CONVERSATION, None, "sft"),
        (CONVERSATION["messages"], None, "sft"),
        (PAIR, None, "preference"),
        (RANKED, None, "preference"),
        ({"q": "x", "good": "a", "bad": "b"}, {"prompt": "q", "chosen": "good", "rejected": "bad"}, "preference"),
        ({**PAIR, "rejected": None}, None, "preference"),  # an invalid pair
        ({**CONVERSATION, "chosen": None, "rejected": None}, None, "sft"),  # a table with the columns of other rows
        (LABELED, None, "kto"),
        ({**CONVERSATION, "kto_tag": True}, None, "kto"),
        ({"text": "a review", "label": True}, None, "sft"),  # a class
        ({**CONVERSATION, "label": True}, None, "kto"),
        ({**CONVERSATION, "label": 1}, None, "sft"),  # a class
        ({"prompt": "q", "completion": "a", "label": 0}, None, "kto"),
        ({"prompt": "q", "completion": "a", "label": "True"}, None, "kto"),
        ({"prompt": "q", "completion": "a", "label": 3}, None, "sft"),  # a class
    ],
)
def test_first_row_determines_the_task(data, columns, expected):
    assert detect_task([Reject(SOURCE, "json", "", "", "", ""), Row(data, SOURCE)], columns) == expected


def test_detected_task_is_used_and_reported(tokenizer_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ftdata")
    tokenizer = tokenizer_dir("tiny_bpe")
    report = write_build([PAIR, RANKED], tokenizer, tmp_path / "pairs", template="chatml")
    assert "2 pairs" in str(report)
    assert caplog.messages == ["the first row is a preference pair: task='preference' (detected)"]
    assert len(preview([PAIR], tokenizer, "chatml", n=1).rows[0].examples) == 2
    assert "── rejected ──" in str(preview([PAIR], template="chatml", n=1))
    assert stats([PAIR], tokenizer, "chatml").groups[0].examples == 2
    assert not stats([LABELED], tokenizer, "chatml").rejected
    assert caplog.messages[-1] == "the first row is a labeled answer (KTO): task='kto' (detected)"


@pytest.mark.parametrize("rows", [[CONVERSATION, PAIR], [PAIR, CONVERSATION]])
@pytest.mark.parametrize("options", [{}, {"task": "sft"}, {"task": "preference"}])
def test_conversations_and_pairs_cannot_be_mixed(rows, options, tmp_path):
    expected = {"sft": "pair_in_sft", "preference": "not_a_pair"}
    task = options.get("task") or ("sft" if rows[0] is CONVERSATION else "preference")
    with pytest.raises(BadRows, match=expected[task]) as error:
        write_build(rows, byte_tokenizer(), tmp_path / "built", template="chatml", **options)
    assert error.value.count == 1
    assert "Fix: " in str(error.value)


def test_supervised_fine_tuning_on_pairs_needs_the_schema():
    with pytest.raises(BadRows, match="pair_in_sft.*schema='preference'"):
        build_sft_dataset([PAIR], byte_tokenizer(), "chatml")
    ds = build_sft_dataset([PAIR], byte_tokenizer(), "chatml", schema="preference")
    assert "rejected side is not used" in str(ds.report)
    assert "rejected" in preview([PAIR], template="chatml", task="sft").rows[0].rejected


def test_task_of_data_that_can_be_read_once_is_not_detected(tmp_path):
    with pytest.raises(BadRows, match="pair_in_sft"):
        write_build(iter([PAIR]), byte_tokenizer(), tmp_path / "built", template="chatml")
    write_build(iter([PAIR]), byte_tokenizer(), tmp_path / "built", template="chatml", task="preference")


@pytest.mark.parametrize("task", ["auto", "sft"])
def test_pairs_are_not_built_without_their_task(task):
    with pytest.raises(UsageError, match="task"):
        build_preference_dataset([PAIR], byte_tokenizer(), "chatml", task=task)


def test_command_names_the_option(tokenizer_dir, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    command = [sys.executable, "-m", "ftdata", "preview", "pairs.jsonl", "-t", tokenizer_dir("tiny_bpe")]
    command += ["--template", "chatml"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert shown.stderr == "ftdata: the first row is a preference pair: --task preference (detected)\n"
