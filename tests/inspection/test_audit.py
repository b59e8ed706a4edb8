"""Audit: findings, report formats, inputs and the command."""

import json
import subprocess

import pytest
import warm
from audit_helpers import PLAIN, audit_rows, talk
from chat_templates import ANSWER, TALK, TOOLED, USER
from tokenizer_makers import CHATML

from ftdata import audit, build_sft_dataset
from ftdata.errors import UsageError


def test_skipped_checks_are_reported(tokenizer):
    report = audit_rows(tokenizer, [PLAIN], {})
    assert not report
    assert report.skipped == {
        "pii": "--pii",
        "near_duplicate": "--near-duplicate-threshold",
        "serving": "--serve",
    }
    assert "Skipped checks: pii (--pii); near_duplicate (--near-duplicate-threshold); serving (--serve)" in str(report)


def test_rejected_rows_are_findings_with_their_code(tokenizer):
    report = audit_rows(tokenizer, [talk("q", ""), PLAIN, "no row"], {})
    assert {one.code: one.where for one in report.findings} == {
        "empty_answer": ["<memory>[0]"],
        "not_a_row": ["<memory>[2]"],
    }
    assert not audit_rows(tokenizer, [talk("q", "")], {"ignore": ["empty_answer"]})


def test_sarif_names_rules_files_and_lines(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (PLAIN, PLAIN, talk("q", ""))))
    report = audit(path, tokenizer())
    sarif = report.as_sarif()
    (run,) = sarif["runs"]
    assert sarif["version"] == "2.1.0"
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["empty_answer", "duplicate"]
    result = run["results"][1]
    assert result["level"] == "warning"
    place = result["locations"][0]["physicalLocation"]
    assert (place["artifactLocation"]["uri"], place["region"]["startLine"]) == (str(path), 2)
    assert f"equal to {path}:1" in result["message"]["text"]


def test_file_names_are_escaped_in_reports(tokenizer, tmp_path):
    path = tmp_path / "we\x1b[31mird\n::error::f.jsonl"
    path.write_text(json.dumps(talk("q", "N/A")) + "\n")
    report = audit(path, tokenizer())
    for text in (str(report), report.as_github()):
        assert "\x1b" not in text
        assert "\n::error" not in text


def test_file_names_are_escaped_in_github_annotations(tokenizer, tmp_path):
    path = tmp_path / "a,b:c%.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (PLAIN, talk("q", "N/A"))))
    lines = audit(path, tokenizer()).as_github().splitlines()
    assert lines[0].startswith(f"::warning file={tmp_path}/a%2Cb%3Ac%25.jsonl,line=2,title=trivial_answer::")
    assert len(lines) == 1


def test_findings_are_sorted_by_severity_and_the_worst_sets_the_exit_code(tokenizer):
    report = audit_rows(tokenizer, [PLAIN, PLAIN, talk("q", ""), {"messages": [USER, {**ANSWER, "mood": "sunny"}]}], {})
    assert [one.severity for one in report.findings] == ["error", "warning", "note"]
    assert [report.fails(one) for one in ("note", "warning", "error", "never")] == [True, True, True, False]
    quiet = audit_rows(tokenizer, [{"messages": [USER, {**ANSWER, "mood": "sunny"}]}], {})
    assert [quiet.fails(one) for one in ("note", "warning", "error", "never")] == [True, False, False, False]
    with pytest.raises(UsageError, match="did you mean 'error'"):
        quiet.fails("eror")


def test_invalid_options_are_refused(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="no_tokenizer"):
        audit([PLAIN])
    with pytest.raises(UsageError, match="expected a similarity"):
        audit([PLAIN], tokenizer(), near_duplicate_threshold=0.2)
    build_sft_dataset([PLAIN], tokenizer(), output_dir=tmp_path / "built")
    with pytest.raises(UsageError, match="template does not apply to a finished build"):
        audit(tmp_path / "built", template="chatml")


def test_rejected_rows_are_errors_even_if_a_flag_has_the_same_code(tokenizer):
    loses = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
    system = {"messages": [{"role": "system", "content": "lost"}, *TALK]}
    calls = {"messages": TOOLED}
    report = audit_rows(tokenizer, [system, system, calls], {"template": loses, "on_dropped_message": "flag"})
    told = [(one.code, one.severity, one.count) for one in report.findings if one.code == "message_dropped"]
    assert told == [("message_dropped", "error", 1), ("message_dropped", "warning", 2)]


def test_leakage_is_reported_for_held_out_data_and_splits(tokenizer, tmp_path):
    data = [PLAIN, talk("another", "answer")]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    given = tokenizer()
    # The data is what is trained on, whatever its split is called.
    (finding,) = audit([{"path": tmp_path, "split": "test"}], given, against=data[:1]).findings
    assert (finding.code, finding.where) == ("leakage", ["<against memory>[0]"])
    assert [
        one.code for one in audit([{**PLAIN, "lang": "en"}], given, against=data, where="lang == 'en'").findings
    ] == ["leakage"]
    assert [one.code for one in audit(data, given, against=data[1:], limit=1).findings] == []
    assert [one.code for one in audit(data, given, against=data[:1], limit=1).findings] == ["leakage"]
    from datasets import Dataset, DatasetDict

    splits = DatasetDict({name: Dataset.from_list([PLAIN]) for name in ("train_sft", "test_sft")})
    assert [one.code for one in audit(splits, given).findings] == ["leakage"]


def test_script_of_an_answer_is_compared_with_the_other_answers(tokenizer):
    answers = [f"東京都です、{number}" for number in range(300)]
    assert not audit_rows(tokenizer, [talk(f"質問 {n}", one) for n, one in enumerate([*answers, "東京", "富士山"])], {})
    (finding,) = audit_rows(
        tokenizer, [talk(f"質問 {n}", one) for n, one in enumerate([*answers, "in English, all of it"])], {}
    ).findings
    assert (finding.code, finding.count) == ("script", 1)


def test_findings_of_a_build_name_its_source_files(tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(PLAIN) + "\n")
    build_sft_dataset([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tokenizer(), output_dir=tmp_path / "built")
    (finding,) = audit(tmp_path / "built").findings
    assert (finding.code, finding.where, finding.locations[0].detail) == (
        "duplicate",
        [f"{tmp_path}/b.jsonl:1"],
        f"equal to {tmp_path}/a.jsonl:1",
    )


@pytest.mark.slow
def test_audit_command(tokenizer, tmp_path):
    path, latin = tmp_path / "d.jsonl", tmp_path / "latin.jsonl"
    path.write_text(json.dumps({"messages": [USER, {**ANSWER, "mood": "sunny"}]}) + "\n")
    latin.write_bytes(json.dumps(talk("où", "là"), ensure_ascii=False).encode("cp1252") + b"\n")

    def run(*arguments):
        command = warm.python("-m", "ftdata", "audit", *arguments, "-t", tokenizer())
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert [run(path, "--fail-on", one).returncode for one in ("note", "warning")] == [1, 0]
    assert json.loads(run(path, "--output-format", "sarif").stdout)["version"] == "2.1.0"
    assert run(path, "--output-format", "github").stdout.startswith("::notice file=")
    assert json.loads(run(path, "--json").stdout)["findings"][0]["code"] == "fields_dropped"
    assert run(path, "--ignore", "fields_dropped").returncode == 0
    assert "did you mean 'duplicate'" in run(path, "--ignore", "dupliacte").stderr
    assert run(path, "--where", "false").returncode == 3
    done = run(latin, "--encoding", "cp1252", "--against", latin)
    assert (done.returncode, "error leakage" in done.stdout) == (1, True)
    plain = run(path).stdout
    assert plain.startswith("1 row: 1 note\nCorrect: every trained turn ends with a trained stop token; ")
    assert "\nnote fields_dropped\n    1 × " in plain


def test_summary_contains_only_true_statements(tokenizer):
    """A statement is left out if a finding contradicts it, and for rows that contain tokens."""
    clean = audit_rows(tokenizer, [PLAIN], {})
    assert "no row is duplicated" in clean.confirmed
    assert "the template prints all messages completely" in clean.confirmed
    assert str(clean).startswith("1 row: no problems found\nCorrect: ")
    twice = audit_rows(tokenizer, [PLAIN, PLAIN], {})
    assert set(clean.confirmed) - set(twice.confirmed) == {"no row is duplicated"}
    silent = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    unprinted = audit_rows(
        tokenizer, [{"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}], {"template": silent}
    )
    assert "the template prints all messages completely" not in unprinted.confirmed
    assert audit_rows(tokenizer, [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], {}).confirmed == ()
    assert audit_rows(tokenizer, [talk("q", "")], {}).confirmed == ()


def test_tool_results_with_other_role_names_are_recognized(tokenizer):
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                               {"from": "observation", "value": "ok"}, {"from": "gpt", "value": "done"}]}]  # fmt: skip
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert "tool_results" not in {one.code for one in audit_rows(tokenizer, rows, {"template": template}).findings}
    rows[0]["conversations"].pop(2)
    assert "tool_results" in {one.code for one in audit_rows(tokenizer, rows, {"template": template}).findings}


def test_packed_build_can_be_the_held_out_data(tokenizer, tmp_path):
    rows = [PLAIN, talk("another", "answer")]
    options = {"packing": "bfd", "max_length": 256}
    build_sft_dataset(rows, tokenizer(), output_dir=tmp_path / "built", **options)
    findings = audit(rows, tokenizer(), against=tmp_path / "built").findings
    assert {finding.code: finding.count for finding in findings}["leakage"] == 2


def test_row_checks_inspect_both_sides_of_a_pair(tokenizer):
    """Several pairs with one prompt are not contradictory."""
    given = [
        {"prompt": "a question", "chosen": "good", "rejected": "it was Ã©tÃ©"},
        {"prompt": "a question", "chosen": "better", "rejected": "good"},
    ]
    report = audit(given, tokenizer(), CHATML, task="preference")
    (finding,) = [one for one in report.findings if one.code == "mojibake"]
    assert finding.locations[0].detail.startswith("rejected side: ")
    assert "contradiction" not in {one.code for one in report.findings}


def test_rejects_with_one_code_keep_their_own_fixes(tokenizer):
    sides = {"chosen": TALK, "rejected": [{**TALK[0], "content": "other"}, *TALK[1:]]}
    report = audit([{"prompt": "multi", **sides}, sides], tokenizer(), CHATML, task="preference")
    fixes = [one.fix for one in report.findings if one.code == "prompt_differs"]
    assert sorted(fix.split()[0] for fix in fixes) == ["remove", "use"]
    many = [{"question": "q", "answer": "a", f"mask_{n}": [n]} for n in range(9)]
    codes = [one.code for one in audit(many, tokenizer(), CHATML).findings]
    assert codes.count("unknown_mask_field") < 9


def test_rows_that_share_a_line_are_located_by_their_number(tokenizer, tmp_path):
    """`json.dump` writes all rows in one line."""
    rows = [{"question": "a long question", "answer": answer} for answer in ("one", "two", "one")]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    report = audit(tmp_path / "d.json", tokenizer(), CHATML)
    (contradiction,) = [one for one in report.findings if one.code == "contradiction"]
    assert contradiction.where == [f"{tmp_path}/d.json:1[1]"]
    (duplicate,) = [one for one in report.findings if one.code == "duplicate"]
    assert duplicate.where == [f"{tmp_path}/d.json:1[2]"]
