"""The pages of the documentation and their code blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
}
FENCE = re.compile(r"^```(\w*) ?([\w.-]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    """Yield language, name and text of each block."""
    for found in FENCE.finditer(PAGES[page].read_text()):
        yield found.groups()


def commands(text):
    """Yield each command of a block with the output that the page shows."""
    text = text.replace("\\\n", " ")
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, printed = part.partition("\n")
        yield command, printed
