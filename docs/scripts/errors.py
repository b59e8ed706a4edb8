"""The page of errors: every code with which ftdata refuses something, read out of the code itself."""

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2] / "ftdata"
# Class -> whom it speaks of, the position of code, message and hint.
KINDS = {
    "Reject": ("a row", 1, 3, 4),
    "_Fault": ("a row", 0, 1, 2),
    "BadRow": ("a row", 0, 1, None),
    "BadRecord": ("a row", 1, 2, None),
    "InputRefused": ("a file or source", 0, 1, None),
    "TemplateRefused": ("a template or tokenizer", 0, 1, None),
    "UsageError": ("a request", 0, 1, None),
    "MissingDependency": ("a request", 0, 1, None),
    "TooManyRejects": ("a build", 0, 1, None),
    "StorageError": ("a disk or process", 0, 1, None),
    "HubError": ("a hub", 0, 1, None),
    "InternalError": ("ftdata", 0, 1, None),
}
EXITS = {
    "a row": 3,
    "a file or source": 3,
    "a template or tokenizer": 3,
    "a request": 2,
    "a build": 4,
    "a disk or process": 5,
    "a hub": 6,
    "ftdata": 7,
}
HEAD = """# Errors

Every error has a stable code, a location, a message and a fix. This page lists the codes and messages in the source;
`…` stands for a value.
Flags that `reject_flags=` contains are codes too: see [Flags](flags.md).

| code | concerns | exit code | message | fix |
|---|---|---:|---|---|
"""


def texts(node, names=()):
    """Yield what an expression may say, with `…` for values."""
    match node:
        case ast.Name(id=name, lineno=line):
            # A text that was put together just before.
            near = [(at, value) for at, other, value in names if other == name and line - 12 < at < line]
            yield from texts(max(near, key=lambda one: one[0])[1], names) if near else ()
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=parts):
            yield "".join(next(iter(texts(part)), "…") for part in parts)
        case ast.IfExp(body=one, orelse=other):
            yield from (*texts(one, names), *texts(other, names))
        case ast.BinOp(left=one, op=ast.Add(), right=other):
            yield f"{next(iter(texts(one)), '…')}{next(iter(texts(other)), '…')}"


def said(call, names, position, keyword=None):
    """Yield what a call says at a position, or by a keyword."""
    node = next((one.value for one in call.keywords if one.arg == keyword), None) if keyword else None
    if node is None and position is not None and position < len(call.args):
        node = call.args[position]
    yield from texts(node, names) if node is not None else ()


def codes():
    """Return code -> whom it is of -> what it says -> the ways out."""
    found = defaultdict(lambda: defaultdict(dict))
    for path in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [
            (node.lineno, target.id, node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        ]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            kind = KINDS.get(getattr(call.func, "id", getattr(call.func, "attr", "")))
            if kind is None:
                continue
            of, code_at, message_at, hint_at = kind
            says = " / ".join(dict.fromkeys(said(call, names, message_at))) or "…"
            hint = " / ".join(said(call, names, hint_at, "hint"))
            for code in said(call, names, code_at):
                if code.strip("…_"):
                    found[code][of].setdefault(says, hint)
    return found


def page():
    """Return the page."""
    lines = []
    for code, kinds in sorted(codes().items()):
        for of, says in sorted(kinds.items()):
            told = "; ".join(text for text in says if text != "…") or "the reason in full"
            hints = "; ".join(dict.fromkeys(filter(None, says.values())))
            cells = (f"`{code}`", of, str(EXITS[of]), told, hints)
            lines.append(
                "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ").strip() for cell in cells) + " |"
            )
    return HEAD + "\n".join(lines) + "\n"
