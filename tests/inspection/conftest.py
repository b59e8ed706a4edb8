"""Fixtures for the tests of inspection."""

import pytest
import xxhash
from tokenizer_makers import CHATML, tiny_bpe


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")

    def get(pad="<|pad|>", chat=CHATML, *, lstrip=False):
        path = folder / xxhash.xxh3_64_hexdigest(f"{pad} {chat} {lstrip}".encode())
        return str(path) if path.exists() else tiny_bpe(path, chat, bos="<s>", pad=pad, lstrip=lstrip)

    return get
