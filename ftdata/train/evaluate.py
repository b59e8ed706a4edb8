"""Evaluate: the base model and the tuned one, asked the same questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import sacrebleu
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import GenerationConfig

from ftdata.errors import BadRow, InputRefused, UsageError
from ftdata.examples import Recipe, make_recipe
from ftdata.readers import read
from ftdata.schemas import normalise
from ftdata.store import read_manifest
from ftdata.train.generate import generate, prompt_ids
from ftdata.train.qlora import load_model


@dataclass(frozen=True, slots=True)
class Answered:
    """One question with what was expected and what each model said."""

    question: str
    expected: str
    base: str
    tuned: str


@dataclass(frozen=True)
class Comparison:
    """Base against tuned: exact match as a share, SacreBLEU (Post 2018) from 0 to 100, and every answer."""

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
        table = Table("question", "expected", "base", "tuned", show_lines=True)
        for row in self.rows:
            tuned = Text(row.tuned, style="green" if row.tuned == row.expected else "red")
            table.add_row(Text(row.question), Text(row.expected), Text(row.base, style="dim"), tuned)
        console.print(table)
        console.print(f"exact match  base {self.exact_base:.0%}  tuned {self.exact_tuned:.0%}", highlight=False)
        console.print(f"SacreBLEU    base {self.bleu_base:.1f}  tuned {self.bleu_tuned:.1f}", highlight=False)


def compare(run_dir: Path, data: Any, n: int, **generation: Any) -> Comparison:
    """Compare base and tuned model; see `ftdata.train.compare`."""
    state = run_dir / "run.json"
    about = json.loads(state.read_text()) if state.is_file() else {}
    if not about.get("finished"):
        raise UsageError("not_a_run", f"{run_dir} is no finished run", hint="make one with `ftdata train`")
    options = read_manifest(Path(about["build"]))["options"]
    recipe = _recipe(about, options)
    rows = list(islice(_conversations(data if data is not None else about["data"], options), n))
    if not rows:
        raise InputRefused("no_questions", "no row has a question with an answer")
    prompts = [prompt_ids(recipe, row) for row in rows]
    base, tuned = _answers(about, run_dir / "model", prompts, recipe, generation)
    expected = [str(row.messages[-1]["content"]) for row in rows]
    questions = [str(next(m["content"] for m in reversed(row.messages[:-1]) if m["role"] == "user")) for row in rows]
    answered = tuple(Answered(*each) for each in zip(questions, expected, base, tuned, strict=True))
    return Comparison(
        _exact(base, expected), _exact(tuned, expected), _bleu(base, expected), _bleu(tuned, expected), answered
    )


def _recipe(about: dict[str, Any], options: dict[str, Any]) -> Recipe:
    template = options["template"]
    source = None if template["name"] == "tokenizer" else template["source"]
    return make_recipe(about["tokenizer"], source, date=template["date"], template_kwargs=template["kwargs"])


def _conversations(data: Any, options: dict[str, Any]) -> Any:
    for row in read(data):
        try:
            conversation = normalise(row, options["schema"], options["columns"])
        except BadRow:
            continue  # the build has reported it
        messages = conversation.messages
        if len(messages) > 1 and messages[-1]["role"] == "assistant" and isinstance(messages[-1].get("content"), str):
            yield conversation


def _answers(
    about: dict[str, Any], tuned_dir: Path, prompts: Sequence[Sequence[int]], recipe: Recipe, generation: dict[str, Any]
) -> tuple[list[str], list[str]]:
    options = {"pad_id": recipe.tokenizer.id_of(recipe.tokenizer.special_tokens.get("pad_token")) or 0, **generation}
    model = load_model(about["model"], about["quantization"])
    model.generation_config = GenerationConfig.from_pretrained(str(tuned_dir))
    base = generate(model, prompts, **options)
    model = PeftModel.from_pretrained(model, str(tuned_dir)) if about["adapter"] else load_model(str(tuned_dir), None)
    tuned = generate(model, prompts, **options)
    decode = recipe.tokenizer.decode
    return [decode(ids) for ids in base], [decode(ids) for ids in tuned]


def _exact(answers: Sequence[str], expected: Sequence[str]) -> float:
    return sum(answer.strip() == right.strip() for answer, right in zip(answers, expected, strict=True)) / len(expected)


def _bleu(answers: Sequence[str], expected: Sequence[str]) -> float:
    return float(sacrebleu.corpus_bleu(list(answers), [list(expected)]).score)
