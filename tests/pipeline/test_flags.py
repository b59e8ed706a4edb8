"""The table of flags: its codes are the codes in the source, and audit, outliers, reports and the docs derive from it."""

import ast
from pathlib import Path

from ftdata.inspection.checks import checks
from ftdata.pipeline.flags import FLAGS, SEVERITIES, describe_flags

PACKAGE = Path(__file__).parents[2] / "ftdata"


def test_every_flag_is_set_by_a_stage():
    """Each code is a string of a module that renders, tokenizes or masks rows."""
    paths = [
        path for name in ("schemas", "templates", "tokenizing", "pipeline") for path in (PACKAGE / name).rglob("*.py")
    ]
    texts = {
        node.value
        for path in paths
        if path.name != "flags.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert set(FLAGS) <= texts


def test_flags_with_a_severity_are_audit_checks():
    flags = {code: (flag.severity, flag.sentence, flag.fix) for code, flag in FLAGS.items() if flag.severity}
    found = {
        code: (check.severity, check.message, check.fix) for code, check in checks.items() if check.scope == "flag"
    }
    assert found == flags
    assert {flag.severity for flag in FLAGS.values()} <= {"", *SEVERITIES}
    assert all(fix for _, _, fix in flags.values())


def test_sentences_are_clauses():
    """A sentence follows a number of examples or a code, so it starts in lower case and has no full stop."""
    for code, flag in FLAGS.items():
        assert flag.sentence[0].islower(), code
        assert not flag.sentence.endswith("."), code
        assert not flag.fix.endswith("."), code


def test_reports_describe_counted_flags():
    counts = {"conversation_split": 1000, "truncated": 2, "trailing_messages": 1}
    split, trailing = describe_flags(counts, repeated_tokens=50)
    assert split == f"1,000 examples: {FLAGS['conversation_split'].sentence} (50 tokens repeat)"
    assert trailing == f"1 example: {FLAGS['trailing_messages'].sentence}"
    assert "repeat" not in next(describe_flags({"conversation_split": 1}))
