"""Names and prose follow the glossary: no filler identifiers, no public name in two modules, few stilted phrases."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILLERS = frozenset(
    [
        "one",
        "said",
        "told",
        "found",
        "given",
        "asked",
        "own",
        "others",
        "made",
        "shown",
        "known",
        "learnt",
        "wanted",
        "kept",
        "begun",
        "laid",
        "seen",
        "chosen",
        "placed",
        "named",
        "whole",
        "alike",
        "apart",
        "there",
        "more",
        "rest",
        "at",
        "mine",
        "theirs",
        "few",
        "some",
    ]
)
MAX_FILLERS = 5.0
"""Filler identifiers per 1,000 lines."""
PHRASES = re.compile(
    r"\b(by chance|goes on|go on with|going on|way out|said of|of which|that is none|(?:is|are) no [a-z]+|by (?:itself|themselves)|nobody"
    r"|mend(?:s|ed)?|blanks?|letters|beside|as it stands|stands? (?:there|in|before|behind|between|beside)|what (?:is|was)|(?:are|is) told"
    r"|come of|learnt|at once|as is|but for|else it|not otherwise|otherwise than|spelled otherwise|of ours|of yours|of its own|all that"
    r"|such as are|(?:is|are) there|that is to be|(?:is|are) to be|for ever|passed over|worked out|held against)\b",
    re.IGNORECASE,
)
MAX_PHRASES = 0.7
"""Stilted phrases per 1,000 words."""


def identifiers(tree):
    """Yield the names, attributes and definitions of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name.lower()


def modules(package):
    return {path: path.read_text() for path in sorted(package.rglob("*.py"))}


def filler_rate(package):
    texts = modules(package)
    lines = sum(
        1 for text in texts.values() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")
    )
    names = [name for text in texts.values() for name in identifiers(ast.parse(text))]
    return 1000 * sum(name.strip("_") in FILLERS for name in names) / max(lines, 1)


def repeated_names(package):
    """Return the public functions and classes with the same name in two modules, except those of the command line."""
    homes = defaultdict(list)
    for path, text in modules(package).items():
        for node in ast.parse(text).body:
            if (
                isinstance(node, ast.FunctionDef | ast.ClassDef)
                and not node.name.startswith("_")
                and path.parent.name != "cli"
            ):
                homes[node.name].append(str(path))
    return {name: paths for name, paths in homes.items() if len(paths) > 1}


def prose(path):
    text = path.read_text()
    if path.suffix == ".md":
        return [re.sub(r"```.*?```", "", text, flags=re.DOTALL)]
    constants = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    return [value for value in constants if isinstance(value, str) and " " in value]


def phrase_rate(paths):
    texts = [text for path in paths for text in prose(path)]
    return 1000 * sum(len(PHRASES.findall(text)) for text in texts) / max(sum(len(text.split()) for text in texts), 1)


def test_identifiers_contain_few_filler_words():
    assert filler_rate(ROOT / "ftdata") <= MAX_FILLERS


def test_public_names_are_defined_in_one_module():
    assert repeated_names(ROOT / "ftdata") == {}


def test_prose_contains_few_stilted_phrases():
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "ftdata").rglob("*.py"),
    ]
    assert phrase_rate(pages) <= MAX_PHRASES


@pytest.mark.parametrize(
    ("code", "fails"),
    [
        (
            "def read(rows):\n    return [one.said for one in rows]\n",
            lambda package: filler_rate(package) > MAX_FILLERS,
        ),
        ("def told(rows):\n    return rows\n", lambda package: filler_rate(package) > MAX_FILLERS),
        ("def read(rows):\n    return rows\n", lambda package: "read" in repeated_names(package)),
        (
            '"""Say what is to be learnt, by chance."""\n',
            lambda package: phrase_rate(package.glob("*.py")) > MAX_PHRASES,
        ),
    ],
)
def test_checks_detect_violations(tmp_path, code, fails):
    for name in ("first.py", "second.py"):
        (tmp_path / name).write_text(code)
    assert fails(tmp_path)
