"""Measure the CPU time of masks in microseconds per conversation, for ftdata and other tools.

    python benchmarks/masks/cost.py FOLDER...          # folders of tokenizers with chat templates

`render` is the template alone, as transformers runs it. `spans` is the text with attributed characters and located
turns, after a conversation with the same structure was rendered; `spans, first` is without such a conversation.
`tokenise` is the tokenizer alone, on the same text. All other columns are complete methods, which return the text,
ids and mask.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peers import PEERS

from ftdata import encode
from ftdata.pipeline.recipe import make_recipe
from ftdata.templates import render_in_worker
from ftdata.templates.render_cache import render_cache
from ftdata.types import Conversation

ROUNDS, TIMES, WORDS = (1, 3, 10, 40), 15, 50

Messages = list[dict[str, Any]]


def main() -> None:
    """Print a table of CPU times for every tokenizer."""
    from transformers import AutoTokenizer
    from transformers import logging as hf_logging

    warnings.simplefilter("ignore")
    hf_logging.set_verbosity_error()
    for folder in map(Path, sys.argv[1:]):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = {rounds: _times(tokenizer, rounds) for rounds in ROUNDS}
        print(f"\n{folder.name}, µs per conversation\n\n| rounds | " + " | ".join(rows[1]) + " |")
        print("|---:|" + "---:|" * len(rows[1]))
        for rounds, times in rows.items():
            print(f"| {rounds} | " + " | ".join(f"{value:,.0f}" for value in times.values()) + " |")


def _times(tokenizer: Any, rounds: int) -> dict[str, float]:
    random.seed(rounds)
    talks = [_talk(rounds) for _ in range(TIMES)]
    recipe = make_recipe(tokenizer)
    texts = iter([tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks])

    def spans(talk: Messages) -> None:
        render_in_worker(Conversation(tuple(talk)), recipe.template, "joint")  # type: ignore[arg-type]

    def first(talk: Messages) -> None:
        render_cache.cache_clear()
        spans(talk)

    spans(talks[0])
    found = {
        "render": _median(lambda talk: tokenizer.apply_chat_template(talk, tokenize=False), talks),
        "spans": _median(spans, talks),
        "spans, first": _median(first, talks),
        "tokenise": _median(lambda _: recipe.tokenizer.encode([next(texts)]), talks),
        "ftdata": _median(lambda talk: encode(talk, tokenizer, turns="joint"), talks),
    }
    for name, peer in PEERS.items():
        try:
            found[name] = _median(lambda talk, peer=peer: peer(tokenizer, talk, None), talks[:3])  # type: ignore[misc]
        except Exception:  # noqa: BLE001  (whatever a peer raises, it refuses this template)
            found[name] = float("nan")
    return found


def _median(work: Callable[[Messages], object], talks: Sequence[Messages]) -> float:
    spent = []
    for talk in talks:
        began = time.perf_counter()
        work(talk)
        spent.append(time.perf_counter() - began)
    return 1e6 * statistics.median(spent)


def _talk(rounds: int) -> Messages:
    return [{"role": role, "content": _words()} for _ in range(rounds) for role in ("user", "assistant")]


def _words() -> str:
    return " ".join(random.choices(_VOCABULARY, k=WORDS))  # noqa: S311  (nothing secret)


_TEXT = """
a about after all and answer are as at because been but by can day do each find first for from get give go
good have he her here how if in into is it just know like little long look made make many may more most new no
not now of on one only or other our out over people place say see she should so some take tell than that the
then there they thing think this time to two under up use very want was water way we well were what when where
which who why will with word work world would write year you
"""
_VOCABULARY = _TEXT.split()


if __name__ == "__main__":
    main()
