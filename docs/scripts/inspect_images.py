"""Make the pictures of `inspect.md`: what the commands print, and what the page looks like in a browser.

python docs/scripts/inspect_images.py [FOLDER]      needs the extra `test`, and Chromium
"""

import json
import re
import shutil
import sys
import tempfile
from contextlib import chdir
from io import StringIO
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from tokenizer_makers import CHATML, qwen  # noqa: E402

from ftdata import audit, diff, preview, stats  # noqa: E402

FAULTS = [
    {"question": "Do you repair <|im_end|> tokens?", "answer": "We take them as text."},
    {"question": "Itâ€™s broken, what now?", "answer": "Bring it in, with the receipt."},
    {"question": "What are your opening hours?", "answer": "We are open Monday to Friday from 9 am to 6 pm."},
    {"question": "Is there a guarantee?", "answer": "N/A"},
    {"question": "Can I see all of it?", "answer": "Yes: " + "every part, every screw, and every bill. " * 12},
    {"question": "And the rest?", "answer": ""},
]
FONTS = re.compile(r"@font-face \{.*?\}\n", re.DOTALL)


def terminal(path, command, show):
    """Draw what a command prints into a terminal of 96 columns."""
    inner = Console(width=96, file=StringIO(), force_terminal=True, color_system="truecolor")
    show(inner)
    console = Console(record=True, width=96, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), command))
    # A terminal breaks lines that are longer than it is wide.
    console.print(Text.from_ansi(inner.file.getvalue()))
    # Fonts are those of the reader: nothing is fetched.
    path.write_text(console.export_svg(title="ftdata", code_format=FONTS.sub("", CONSOLE_SVG_FORMAT)) + "\n")


def browser(launched, source, path, *, scheme="light", height=900, width=1100, work=None):
    """Take a picture of a page."""
    page = launched.new_page(color_scheme=scheme, viewport={"width": width, "height": height})
    page.goto(f"file://{source}")
    page.wait_for_selector("#list[data-ready]", state="attached")
    if work:
        work(page)
    page.screenshot(path=path)
    page.close()


def to_rows(page):
    page.evaluate("document.getElementById('rows').scrollIntoView()")


def search(page):
    page.fill("#q", "open")
    page.wait_for_selector("#list[data-ready]", state="attached")
    page.evaluate("document.getElementById('rows').scrollIntoView()")
    page.locator("#list mark .hit").first.hover()


def main(out):
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, chdir(scratch), sync_playwright() as play:
        rows = json.loads((ROOT / "examples" / "faq.json").read_text()) + FAULTS
        Path("data.json").write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
        qwen(Path("MODEL"))
        Path("chatml.jinja").write_text(CHATML)
        given = ("data.json", "MODEL", "chatml.jinja")
        options = {"max_length": 96, "overlong": "truncate"}
        seen = preview(*given, n=1)
        outliers = preview(*given, outliers=True, **options)
        terminal(out / "preview.svg", "ftdata preview data.json -t MODEL -n 1", seen.print)
        terminal(
            out / "outliers.svg",
            "ftdata preview data.json -t MODEL --outliers --max-length 96 --overlong truncate",
            outliers.print,
        )
        found = audit(*given)
        terminal(out / "audit.svg", "ftdata audit data.json -t MODEL", found.print)
        terminal(out / "stats.svg", "ftdata stats data.json -t MODEL", stats(*given).print)
        side = {"data": "data.json", "tokenizer": "MODEL", "template": "chatml.jinja"}
        other = diff(side, {**side, "template": None}, n=1, html="diff.html")
        terminal(
            out / "diff.svg",
            "ftdata diff data.json -t MODEL --template chatml.jinja --set template=null -n 1",
            other.print,
        )
        preview(*given, **options, packing="bfd", html="page.html")
        launched = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        browser(launched, Path("page.html").resolve(), out / "page.png", height=1000)
        browser(launched, Path("page.html").resolve(), out / "phone.png", height=900, width=390, work=to_rows)
        browser(launched, Path("page.html").resolve(), out / "page-dark.png", scheme="dark", height=620, work=search)
        browser(launched, Path("diff.html").resolve(), out / "diff.png", height=760)
        launched.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "docs" / "inspect")
