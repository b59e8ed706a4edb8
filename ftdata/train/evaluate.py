"""Evaluate: the base model and the tuned one, asked the same questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig

from ftdata.build import load_build
from ftdata.errors import InputRefused, UsageError
from ftdata.examples import build_rows
from ftdata.readers import sources
from ftdata.recipe import make_recipe
from ftdata.store import read_manifest
from ftdata.tokenize import load_tokenizer
from ftdata.train import checkpoints
from ftdata.train.generate import generate, until_stop
from ftdata.train.qlora import load_model
from ftdata.types import IGNORE_INDEX, Reject


@dataclass(frozen=True, slots=True)
class Answered:
    """One prompt with what was expected and what each model said."""

    prompt: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Comparison:
    """Base against tuned: exact match as a share, SacreBLEU (Post 2018) from 0 to 100, and every answer."""

    asked: str
    exact_base: float
    exact_tuned: float
    bleu_base: float
    bleu_tuned: float
    rows: tuple[Answered, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return asdict(self)

    def print(self, console: Console) -> None:
        """Print the answers side by side, and the scores."""
        table = Table("prompt", "expected", "base", "tuned", show_lines=True)
        for row in self.rows:
            tuned = Text(row.tuned, style="green" if row.tuned == row.expected else "red")
            table.add_row(Text(row.prompt), Text(row.expected), Text(row.base, style="dim"), tuned)
        console.print(table)
        console.print(f"{len(self.rows)} rows of {self.asked}", highlight=False, markup=False)
        console.print(f"exact match  base {self.exact_base:.0%}  tuned {self.exact_tuned:.0%}", highlight=False)
        console.print(f"SacreBLEU    base {self.bleu_base:.1f}  tuned {self.bleu_tuned:.1f}", highlight=False)


def compare(run_dir: Path, data: Any, n: int, **generation: Any) -> Comparison:
    """Compare base and tuned model; see `ftdata.train.compare`."""
    about = checkpoints.read(run_dir)
    if not about.get("finished"):
        raise UsageError("not_a_run", f"{run_dir} is no finished run", hint="make one with `ftdata train`")
    tokenizer = load_tokenizer(about["tokenizer"])
    stops = set(np.atleast_1d(GenerationConfig.from_pretrained(str(run_dir / "model")).eos_token_id).tolist())
    build = run_dir / about["build"]
    if data is None:
        asked, pairs = _from_build(build)
    else:
        asked, pairs = str(data), _from_rows(data, about["tokenizer"], read_manifest(build)["options"])
    questions = (question for ids, labels in pairs if (question := last_turn(ids, labels, stops)) is not None)
    chosen = list(islice(questions, n))
    if not chosen:
        raise InputRefused("no_questions", f"no row of {asked} has a prompt and an answer")
    prompts = [prompt for prompt, _ in chosen]
    expected = [tokenizer.decode(answer) for _, answer in chosen]
    generated = _answers(about, run_dir / "model", prompts, stops, generation)
    base, tuned = ([tokenizer.decode(ids) for ids in answers] for answers in generated)
    shown = [tokenizer.decode(ids, skip_control=True).strip() for ids in prompts]
    rows = tuple(Answered(*each) for each in zip(shown, expected, base, tuned, strict=True))
    scores = _exact(base, expected), _exact(tuned, expected), _bleu(base, expected), _bleu(tuned, expected)
    return Comparison(asked, *scores, rows)


Tokens = tuple[Sequence[int], Sequence[int]]
"""Ids and labels of one document."""


def last_turn(ids: Sequence[int], labels: Sequence[int], stops: set[int]) -> tuple[list[int], list[int]] | None:
    """Return a document's prompt and expected answer: its last trained stretch without the stop, and all before it.

    So what is asked is what was trained, token by token. `None` where nothing stands before the answer.

    >>> last_turn([1, 7, 8, 5, 2], [-100, -100, -100, 5, 2], {2})
    ([1, 7, 8], [5])
    """
    end = max(position for position, label in enumerate(labels) if label != IGNORE_INDEX) + 1
    start = end
    while labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return (list(ids[:start]), until_stop(list(ids[start:end]), stops)) if start > 1 else None


def _from_build(build: Path) -> tuple[str, Iterator[Tokens]]:
    splits = load_build(build)
    name = "test" if "test" in splits else "train"

    def documents() -> Iterator[Tokens]:
        for row in splits[name]:
            at = 0
            for length in row["seq_lengths"]:
                yield row["input_ids"][at : at + length], row["labels"][at : at + length]
                at += length

    return f"the {name} split of {build}", documents()


def _from_rows(data: Any, tokenizer: str, options: dict[str, Any]) -> Iterator[Tokens]:
    template = options["template"]
    # Builds of an earlier version lack what it did not know.
    same = ("schema", "columns", "turns", "control_tokens", "dropped", "unclosed")
    recipe = make_recipe(
        tokenizer,
        None if template["name"] == "tokenizer" else template["source"],
        date=template["date"],
        template_kwargs=template["kwargs"],
        **{name: options[name] for name in same if name in options},
    )
    for outcome in build_rows(recipe, (row for source in sources(data) for row in source.rows())):
        if isinstance(outcome, Reject):
            raise InputRefused(outcome.code, outcome.reason, where=str(outcome.source), hint=outcome.fix)
        yield outcome.examples[-1].input_ids.tolist(), outcome.examples[-1].labels.tolist()


def _answers(
    about: dict[str, Any], tuned_dir: Path, prompts: Sequence[Sequence[int]], stops: set[int], options: dict[str, Any]
) -> Iterator[list[list[int]]]:
    setup = about["setup"]
    tuned_settings = GenerationConfig.from_pretrained(str(tuned_dir))
    model = load_model(setup["model"], setup["quantization"])
    # The base model may stop as it always did, or as it was taught since.
    own = np.atleast_1d(
        model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else []
    )
    model.generation_config.eos_token_id = sorted(stops | set(own.tolist()))
    model.generation_config.pad_token_id = tuned_settings.pad_token_id
    yield generate(model, prompts, **options)
    model = PeftModel.from_pretrained(model, str(tuned_dir)) if about["adapter"] else load_model(str(tuned_dir), None)
    model.generation_config = tuned_settings
    yield generate(model, prompts, **options)


def _exact(answers: Sequence[str], expected: Sequence[str]) -> float:
    return sum(answer.strip() == right.strip() for answer, right in zip(answers, expected, strict=True)) / len(expected)


def _bleu(answers: Sequence[str], expected: Sequence[str]) -> float:
    return float(sacrebleu.corpus_bleu(list(answers), [list(expected)]).score)
