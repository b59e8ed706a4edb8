"""Evaluate: the base model and the tuned one, asked the same questions."""

from __future__ import annotations

import json
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
from ftdata.examples import make_recipe
from ftdata.readers import read
from ftdata.schemas import normalise
from ftdata.store import read_manifest
from ftdata.tokenize import load_tokenizer
from ftdata.train.generate import generate, prompt_ids, until_stop
from ftdata.train.qlora import load_model
from ftdata.types import IGNORE_INDEX


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
    state = run_dir / "run.json"
    about = json.loads(state.read_text(encoding="utf-8")) if state.is_file() else {}
    if not about.get("finished"):
        raise UsageError("not_a_run", f"{run_dir} is no finished run", hint="make one with `ftdata train`")
    tokenizer = load_tokenizer(about["tokenizer"])
    stops = set(np.atleast_1d(GenerationConfig.from_pretrained(str(run_dir / "model")).eos_token_id).tolist())
    build = run_dir / about["build"]
    if data is None:
        asked, questions = _from_build(build, stops)
    else:
        asked, questions = str(data), _from_rows(data, about, read_manifest(build)["options"])
    chosen = list(islice(questions, n))
    if not chosen:
        raise InputRefused("no_questions", f"no row of {asked} has a prompt and an answer")
    prompts = [prompt for prompt, _ in chosen]
    expected = [tokenizer.decode(answer) for _, answer in chosen]
    base, tuned = (
        [tokenizer.decode(ids) for ids in answers]
        for answers in _answers(about, run_dir / "model", prompts, generation)
    )
    shown = [tokenizer.decode(ids, skip_control=True).strip() for ids in prompts]
    rows = tuple(Answered(*each) for each in zip(shown, expected, base, tuned, strict=True))
    return Comparison(
        asked, _exact(base, expected), _exact(tuned, expected), _bleu(base, expected), _bleu(tuned, expected), rows
    )


Question = tuple[list[int], list[int]]
"""The ids of a prompt, and those of the expected answer without its stop."""


def _from_build(build: Path, stops: set[int]) -> tuple[str, Iterator[Question]]:
    """Take prompts and answers as they were trained: the last trained stretch of each document, and all before it."""
    splits = load_build(build)
    name = "test" if "test" in splits else "train"

    def questions() -> Iterator[Question]:
        for row in splits[name]:
            at = 0
            for length in row["seq_lengths"]:
                ids, labels = row["input_ids"][at : at + length], row["labels"][at : at + length]
                at += length
                trained = [position for position, label in enumerate(labels) if label != IGNORE_INDEX]
                start = trained[-1]
                while labels[start - 1] != IGNORE_INDEX:
                    start -= 1
                if start > 1:
                    yield ids[:start], until_stop(ids[start : trained[-1] + 1], stops)

    return f"the {name} split of {build}", questions()


def _from_rows(data: Any, about: dict[str, Any], options: dict[str, Any]) -> Iterator[Question]:
    template = options["template"]
    source = None if template["name"] == "tokenizer" else template["source"]
    recipe = make_recipe(about["tokenizer"], source, date=template["date"], template_kwargs=template["kwargs"])
    for row in read(data):
        conversation = normalise(row, options["schema"], options["columns"])
        messages = conversation.messages
        if len(messages) > 1 and messages[-1]["role"] == "assistant" and isinstance(messages[-1].get("content"), str):
            yield (
                prompt_ids(recipe, conversation),
                recipe.tokenizer.encode([str(messages[-1]["content"])])[0].ids.tolist(),
            )


def _answers(
    about: dict[str, Any], tuned_dir: Path, prompts: Sequence[Sequence[int]], generation: dict[str, Any]
) -> Iterator[list[list[int]]]:
    settings = GenerationConfig.from_pretrained(str(tuned_dir))
    model = load_model(about["model"], about["quantization"])
    model.generation_config = settings
    yield generate(model, prompts, **generation)
    model = PeftModel.from_pretrained(model, str(tuned_dir)) if about["adapter"] else load_model(str(tuned_dir), None)
    yield generate(model, prompts, **generation)


def _exact(answers: Sequence[str], expected: Sequence[str]) -> float:
    return sum(answer.strip() == right.strip() for answer, right in zip(answers, expected, strict=True)) / len(expected)


def _bleu(answers: Sequence[str], expected: Sequence[str]) -> float:
    return float(sacrebleu.corpus_bleu(list(answers), [list(expected)]).score)
