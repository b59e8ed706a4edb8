"""Fixtures for the tests of inspection."""

import pytest
import xxhash
from tokenizer_makers import CHATML, tiny_bpe

from ftdata import preview


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")

    def get(pad="<|pad|>", chat=CHATML, *, lstrip=False):
        path = folder / xxhash.xxh3_64_hexdigest(f"{pad} {chat} {lstrip}".encode())
        return str(path) if path.exists() else tiny_bpe(path, chat, bos="<s>", pad=pad, lstrip=lstrip)

    return get


@pytest.fixture(scope="module")
def context(chromium):
    """A window without a network."""
    context = chromium.new_context(offline=True, viewport={"width": 1200, "height": 900})
    # Chromium opens a page in half the time while it has another page.
    context.new_page()
    yield context
    context.close()


@pytest.fixture
def opened(context):
    """Return a function that opens a page from a file."""
    pages = []

    def open_page(path):
        page = context.new_page()
        pages.append(page)
        page.asked, page.faults = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("console", lambda said: page.faults.append(said.text) if said.type == "error" else None)
        page.goto(f"file://{path}")
        page.wait_for_selector("#list[data-ready]", state="attached")
        return page

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture
def simple(opened, tmp_path):
    """Return a function that opens the page of some rows."""
    folder = tiny_bpe(tmp_path / "t", bos="<s>")

    def get(rows, **options):
        preview(rows, folder, html=tmp_path / "page.html", **{"n": 1000, **options})
        return opened(tmp_path / "page.html")

    return get
