"""Compare the masks of preference pairs on real chat templates.

    python benchmarks/masks/pairs.py --corpus DIR --tokenizer DIR [--methods ftdata trl] [--workers 2] [--show 20]

Each template renders pairs of several kinds (`PAIRS`). The correct mask of a side consists of the turns from the first
message on in which the sides differ; `oracle.py` determines it without ftdata. A pair is exact if the ids and the
trained tokens of both sides are exact. If they differ only in whitespace after a stop token, which is trained or
missing, the pair is counted separately. Pairs whose correct mask is uncertain, or which the template cannot render, are
left out. `pair_peers.py` contains the methods of tools other than TRL.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import oracle
from corpus import CLOCK, Template, from_folder
from pair_peers import PEERS
from run import load_tokenizer, show_progress, silence

Messages = list[dict[str, Any]]
Side = tuple[list[int], list[bool]]
"""Token ids, and whether each token is trained."""
Method = Callable[[Any, Messages, Messages, Messages, Any], tuple[Side, Side]]
"""(tokenizer, prompt, chosen, rejected, tools) -> the chosen and the rejected side, each with the prompt."""


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _answer(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _call(city: str) -> dict[str, Any]:
    return {"type": "function", "id": "call00001", "function": {"name": "find_train", "arguments": {"to": city}}}


_RESULT = {"role": "tool", "name": "find_train", "tool_call_id": "call00001", "content": "at 9:14"}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "find_train",
            "description": "Find a train",
            "parameters": {"type": "object", "properties": {"to": {"type": "string"}}, "required": ["to"]},
        },
    }
]
_REASONED = [_user("5 + 6?"), _answer("11.", reasoning_content="Five and six are eleven."), _user("8 + 9?")]

PAIRS: dict[str, tuple[Messages, Messages, Messages, Any]] = {
    "single turn": ([_user("How far is the moon?")], [_answer("About 384,400 km.")], [_answer("I forgot.")], None),
    "system": (
        [{"role": "system", "content": "Be brief."}, _user("Why is the sky blue?")],
        [_answer("Scattering.")],
        [_answer("Because light with a short wavelength is scattered more.")],
        None,
    ),
    "last of three turns": (
        [_user("Name a river."), _answer("The Loire."), _user("Another?"), _answer("The Danube!"), _user("In Asia?")],
        [_answer("The Mekong.")],
        [_answer("The Nile.")],
        None,
    ),
    "several turns after the difference": (
        [_user("Name a river.")],
        [_answer("The Loire."), _user("Another?"), _answer("The Danube!")],
        [_answer("A river?"), _user("Yes."), _answer("The Loire.")],
        None,
    ),
    "equal first tokens": ([_user("Count.")], [_answer("One, two, three.")], [_answer("One, two, four.")], None),
    "line breaks": ([_user("Poem?\n")], [_answer("\n\nRoses\n")], [_answer("\nViolets")], None),
    "tool loop": (
        [_user("When is the next train to Ulm?")],
        [_answer("Let me look.", tool_calls=[_call("Ulm")]), _RESULT, _answer("At 9:14.")],
        [_answer("I will look.", tool_calls=[_call("Bonn")]), _RESULT, _answer("At noon.")],
        _TOOLS,
    ),
    "thinking on one side": (
        [_user("5 + 6?")],
        [_answer("11.", reasoning_content="Five and six are eleven.")],
        [_answer("12.")],
        None,
    ),
    "thinking in the history": (
        _REASONED,
        [_answer("17.", reasoning_content="Eight and nine are seventeen.")],
        [_answer("18.", reasoning_content="I guess.")],
        None,
    ),
}
"""Kind of pair -> prompt, chosen messages, rejected messages, tools."""


class Score(NamedTuple):
    """The outcome of a method for a pair: `exact`, `blanks`, `refused` or `silent`."""

    method: str
    kind: str
    template: str
    outcome: str
    why: str = ""


def ours(tokenizer: Any, prompt: Messages, chosen: Messages, rejected: Messages, tools: Any) -> tuple[Side, Side]:
    """Return the sides of ftdata."""
    from ftdata.pipeline.examples import build_rows
    from ftdata.pipeline.recipe import make_recipe
    from ftdata.types import Reject, Row, Source

    recipe = make_recipe(tokenizer, task="preference", control_tokens="allow", date=CLOCK)
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **({"tools": tools} if tools else {})}
    (outcome,) = build_rows(recipe, [Row(row, Source("pairs", 0))])
    if isinstance(outcome, Reject):
        raise ValueError(f"{outcome.code} {outcome.reason}")  # noqa: TRY004  (the row is invalid)
    first, second = ((one.input_ids.tolist(), one.trained.tolist()) for one in outcome.examples)
    return first, second


def trl(tokenizer: Any, prompt: Messages, chosen: Messages, rejected: Messages, tools: Any) -> tuple[Side, Side]:
    """Return the sides of TRL's `DPOTrainer`, which trains all tokens after the prompt."""
    from trl import DPOTrainer

    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **({"tools": tools} if tools else {})}
    rows = _Rows([row])
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    (made,) = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, settings, "train")
    sides = (made["chosen_ids"], made["rejected_ids"])
    count = len(made["prompt_ids"])
    first, second = ((made["prompt_ids"] + ids, [False] * count + [True] * len(ids)) for ids in sides)
    return first, second


class _Rows(list[dict[str, Any]]):
    """Rows with the method `map` of a data set, which would add missing keys of messages with the value `None`."""

    def map(self, function: Callable[..., dict[str, Any]], fn_kwargs: dict[str, Any], **_: Any) -> _Rows:
        return _Rows(row | function(row, **fn_kwargs) for row in self)


METHODS: dict[str, Method] = {"ftdata": ours, "trl": trl, **PEERS}


def score_template(folder: str, specials: tuple[str, ...], methods: Sequence[str], template: Template) -> list[Score]:
    """Score all methods on all pairs of one template."""
    silence()
    tokenizer = load_tokenizer(folder, specials)
    tokenizer.chat_template = template.source
    tokenizer.bos_token, tokenizer.eos_token = template.bos_token, template.eos_token
    tokenizer.pad_token = template.eos_token
    return [*chain.from_iterable(_score_pair(tokenizer, template, kind, methods) for kind in PAIRS)]


def _score_pair(tokenizer: Any, template: Template, kind: str, methods: Sequence[str]) -> Iterator[Score]:
    prompt, chosen, rejected, tools = PAIRS[kind]
    truths = [_find_truth(tokenizer, template, prompt + side, len(prompt), tools) for side in (chosen, rejected)]
    if None in truths:
        return
    for name in methods:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                sides = METHODS[name](tokenizer, prompt, chosen, rejected, tools)
        except Exception as error:  # noqa: BLE001  (whatever a method raises, it refuses)
            yield Score(name, kind, template.name, "refused", str(error)[:300])
            continue
        outcomes = {_compare(side, truth) for side, truth in zip(sides, truths, strict=True)}
        outcome = next(one for one in ("silent", "blanks", "exact") if one in outcomes)
        yield Score(name, kind, template.name, outcome)


_Truth = tuple[list[int], Any, Any]
"""Token ids; and two masks: the trained tokens, and the whitespace tokens after a stop token."""


def _find_truth(tokenizer: Any, template: Template, messages: Messages, first: int, tools: Any) -> _Truth | None:
    def render(some: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(some), tools=tools, tokenize=False, add_generation_prompt=generation_prompt
            )
        )

    try:
        text = render(messages, False)
        spans = oracle.spans_of(messages, template.eos_token, render, first)
    except Exception:  # noqa: BLE001  (a template may raise anything)
        return None
    if spans is None or not _prints_everything(messages[first:], text):
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = np.asarray(encoded["offset_mapping"]).reshape(-1, 2)
    trained, blank = np.zeros(len(offsets), bool), np.zeros(len(offsets), bool)
    for start, end in spans:
        trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
        after = len(text[end:]) - len(text[end:].lstrip())
        blank |= (offsets[:, 0] >= end) & (offsets[:, 1] <= end + after)
    return list(encoded["input_ids"]), trained, blank


def _prints_everything(messages: Messages, text: str) -> bool:
    """Return whether the text contains the tool calls of the answers. Without them, no mask is correct."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    return all(call["function"]["arguments"]["to"] in text for call in calls)


def _compare(side: Side, truth: _Truth) -> str:
    (ids, mask), (expected_ids, trained, blank) = side, truth
    count = len(ids)
    if ids != expected_ids[:count] or not blank[count:].all():
        return "silent"
    different = np.append(np.asarray(mask, bool) != trained[:count], [True] * (len(blank) - count))
    return "silent" if different[~blank].any() else "blanks" if different.any() else "exact"


def table(scores: Sequence[Score], column: Callable[[Score], str]) -> str:
    """Return the scores as a Markdown table, with a row for each method and value of `column`."""
    lines = [
        "| method | pairs | defined | exact | except whitespace | refused | silently wrong |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    groups = dict.fromkeys((score.method, column(score)) for score in scores)
    for method, value in groups:
        counts = Counter(score.outcome for score in scores if (score.method, column(score)) == (method, value))
        shares = " | ".join(f"{counts[name] / counts.total():.2%}" for name in ("exact", "blanks", "refused"))
        silent = f"{counts['silent']:,} ({counts['silent'] / counts.total():.2%})"
        lines.append(f"| {method} | {value} | {counts.total():,} | {shares} | {silent} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of templates")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--limit", type=int, help="only about so many templates, evenly chosen")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--show", type=int, default=20, help="how many wrong pairs of ftdata to name")
    return parser.parse_args()


def main() -> None:
    """Run the benchmark and print the scores."""
    given = _arguments()
    templates = list(from_folder(given.corpus))
    templates = templates[:: max(1, len(templates) // given.limit)] if given.limit else templates
    specials = sorted(set().union(*(template.specials for template in templates)))
    work = partial(score_template, str(given.tokenizer), tuple(specials), tuple(given.methods))
    with ProcessPoolExecutor(given.workers) as pool:
        results = show_progress(pool.map(work, templates, chunksize=4), len(templates))
        scores = sorted(chain.from_iterable(results), key=lambda score: given.methods.index(score.method))
    wrong = [score for score in scores if score.method == "ftdata" and score.outcome not in ("exact", "refused")]
    for score in wrong[: given.show]:
        print(f"{score.outcome}: {score.template}: {score.kind} {score.why}", file=sys.stderr)
    refusals = Counter(
        score.why.split()[0] for score in scores if (score.method, score.outcome) == ("ftdata", "refused")
    )
    print(f"refusals of ftdata: {refusals.most_common()}", file=sys.stderr)
    print(table(scores, lambda _: "all"))
    print(table(scores, lambda score: score.kind))


if __name__ == "__main__":
    main()
