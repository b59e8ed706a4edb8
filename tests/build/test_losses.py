"""Builds are not replaced, and rows are not lost, without a word."""

import json
import logging
import shutil
from functools import partial

import pytest

from ftdata import build_preference_dataset, build_sft_dataset, verify
from ftdata.build.dataset import write_build
from ftdata.errors import InputRefused, TooManyRejects, UsageError


def test_build_of_other_data_or_options_is_not_replaced(tokenizer_dir, tmp_path):
    rows = [{"question": "2+2?", "answer": "4"}] * 3
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    build = partial(build_sft_dataset, tokenizer=tokenizer_dir("tiny_bpe"), output_dir=tmp_path / "out")
    build(str(tmp_path / "a.json"))
    for data, options, changed in (
        ("b.json", {}, "data"),
        (
            "a.json",
            {"train_on": "all", "seed": 1},
            r'train_on \(build: "assistant", requested: "all"\), seed \(build: 0, requested: 1\)',
        ),
    ):
        with pytest.raises(UsageError, match=f"different options: {changed}.* Fix: set overwrite=True"):
            build(str(tmp_path / data), **options)
    # A build of the same sources follows their contents.
    (tmp_path / "a.json").write_text(json.dumps(rows * 2))
    assert len(build(str(tmp_path / "a.json"))["train"]) == 6
    assert len(build(str(tmp_path / "b.json"), train_on="all", overwrite=True)["train"]) == 3
    assert len(build(rows[:2], overwrite=True)["train"]) == 2


def test_large_losses_are_noted_with_the_options_that_change_them(tokenizer_dir):
    rows = [{"question": "2+2?", "answer": "4"}] * 150
    long, bad = {"question": "2+2?", "answer": " ".join(map(str, range(99)))}, {"question": "2+2?", "answer": ""}
    build = partial(
        build_sft_dataset, tokenizer=tokenizer_dir("tiny_bpe"), max_length=64, on_bad_rows="quarantine", max_rejects=99
    )
    assert build([*rows, bad]).report.notes == ()
    (note,) = build([*rows, bad, long, long]).report.notes
    assert note.startswith("left out: 3 of 153 rows (2.0%) and ")
    assert (
        "2 rows longer than max_length (shorten the rows, or raise max_length up to the limit of the model; "
        "overlong='drop_turns' keeps the turns that fit, overlong='truncate' cuts answers); 1 invalid row" in note
    )
    cut, truncated = build([*rows, *[long] * 9], overlong="truncate").report.notes
    assert cut.startswith("left out: 0 of 159 rows (0.0%) and ")
    assert "tokens beyond max_length" in cut
    assert "max_length cuts an answer" in truncated
    filtered = build([*rows[:12], {"question": "q", "answer": "5"}], where="answer != '4'").report.notes[0]
    assert "12 rows excluded by where" in filtered


@pytest.mark.parametrize("options", ["[]", "null", '"x"'])
def test_build_with_a_damaged_report_is_replaced(options, tokenizer_dir, tmp_path):
    rows = [{"question": "2+2?", "answer": "4"}]
    build = partial(build_sft_dataset, rows, tokenizer_dir("tiny_bpe"), output_dir=tmp_path / "out")
    build()
    report = json.loads((tmp_path / "out" / "report.json").read_bytes())
    (tmp_path / "out" / "report.json").write_text(json.dumps({**report, "options": json.loads(options)}))
    assert len(build()["train"]) == 1


def test_only_a_larger_max_length_helps_if_no_answer_begins_within_it(tokenizer_dir):
    rows = [{"question": "word " * 100, "answer": "4"}, {"question": "2+2?", "answer": "4"}]
    report = build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), max_length=60, overlong="truncate").report
    assert "1 row longer than max_length (shorten the rows, or raise max_length up to the limit of the model)" in str(
        report
    )


@pytest.mark.parametrize("manifest", [None, "{"])
def test_build_without_a_readable_manifest_can_be_removed_and_built_again(tokenizer_dir, tmp_path, manifest):
    out, rows = tmp_path / "out", [{"question": "2+2?", "answer": "4"}]
    build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), output_dir=out)
    (out / "manifest.json").unlink() if manifest is None else (out / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match=f"contains a damaged build.*remove {out}, then build again"):
        build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), output_dir=out, overwrite=True)
    shutil.rmtree(out)
    assert len(build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), output_dir=out)["train"])


def test_similar_name_is_suggested_for_a_missing_build(tokenizer_dir, tmp_path):
    rows = [{"question": "2+2?", "answer": "4"}]
    build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), output_dir=tmp_path / "built")
    with pytest.raises(InputRefused, match="it does not exist.*did you mean '.*built'?"):
        verify(tmp_path / "buil")


def test_selected_rows_are_counted(tokenizer_dir, tmp_path):
    """Weights and deduplication change which built rows are trained; the report says how many."""
    rows = [{"question": f"{n}+1?", "answer": f"{n + 1}"} for n in range(10)]
    build = partial(build_sft_dataset, tokenizer=tokenizer_dir("tiny_bpe"))
    assert "selected" not in str(build(rows).report)
    assert "selected 10 examples from 20 (dedup)" in str(build(rows * 2, dedup=True).report)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert "selected 20 examples from 10 (weight)" in str(build([{"path": tmp_path / "a.json", "weight": 2}]).report)
    pairs = [{"prompt": row["question"], "chosen": row["answer"], "rejected": "?"} for row in rows]
    report = build_preference_dataset(pairs, tokenizer_dir("tiny_bpe"), sample=4).report
    assert "selected 4 pairs from 10 (sample)" in str(report)


def test_file_that_is_listed_twice_is_not_resumed_and_may_have_no_row_left(tokenizer_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO, "ftdata")
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"question": f"{n}+1?", "answer": f"{n + 1}"} for n in range(10)]))
    data = [{"path": path}, {"path": path, "rows": 3}]
    report = write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / "built", dedup=True)
    assert f"no row of {path} is left for rows: 3" in report.notes
    assert not caplog.messages


def test_rejects_of_split_conversations_count_the_fitting_examples(tokenizer_dir):
    messages = [{"role": role, "content": "word " * 30} for role in ("user", "assistant") * 3]
    with pytest.raises(InputRefused, match=r"2 of the 3 examples of this conversation fit.*overlong='drop_turns'"):
        build_sft_dataset([{"messages": messages}], tokenizer_dir("tiny_bpe"), turns="split", max_length=650)
    for policy in ("drop_turns", "truncate"):
        options = {"turns": "split", "max_length": 650, "overlong": policy}
        ds = build_sft_dataset([{"messages": messages}], tokenizer_dir("tiny_bpe"), **options)
        assert len(ds["train"]) == 2
        assert "1 example of split conversations left out" in str(ds.report)


def test_rows_without_a_column_of_where_are_noted(tokenizer_dir, tmp_path):
    rows = [{"question": "a", "answer": "b", "lang": lang} for lang in ("en", "de", "de")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = "lang == 'en' or langg == 'de'"
    report = write_build(path, tokenizer_dir("tiny_bpe"), tmp_path / "built", template="chatml", where=where)
    assert "rows excluded because they lack a column that where= uses: langg (2 rows)" in report.notes
    marked = [{**rows[0], "keep": 1}, *rows]
    report = write_build(marked, tokenizer_dir("tiny_bpe"), tmp_path / "bare", template="chatml", where="keep")
    assert "rows excluded because they lack a column that where= uses: keep (3 rows)" in report.notes
    path.write_text('{"question": "x"\n' * 2 + "".join(json.dumps(row) + "\n" for row in rows))
    options = {"where": "langg == 'de'", "on_bad_rows": "quarantine", "max_rejects": 1, "template": "chatml"}
    with pytest.raises(TooManyRejects, match=r"(?s)2 rows: .* at the end of the line.*no row has the column 'langg'"):
        write_build(path, tokenizer_dir("tiny_bpe"), tmp_path / "built", overwrite=True, **options)
