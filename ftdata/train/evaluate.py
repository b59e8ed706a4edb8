"""Evaluate: the base model and the tuned one, asked the same questions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import sacrebleu
import torch

from ftdata.build import load_build
from ftdata.errors import InputRefused
from ftdata.tokenize import Tokenizer
from ftdata.train.answers import generate
from ftdata.train.chat import stopping
from ftdata.train.data import splits_of
from ftdata.train.finished_run import Finished, finished, load_base, load_tuned
from ftdata.train.prompts import documents, last_turn, of_rows
from ftdata.train.report import Answered, Comparison, Scores
from ftdata.types import IGNORE_INDEX

Document = tuple[list[int], list[int]]
"""Ids and labels."""


def compare(
    run_dir: Path,
    data: Any,
    n: int | None,
    *,
    trust_remote_code: bool = False,
    done: Callable[[int, int], None] | None = None,
    **generation: Any,
) -> Comparison:
    """Compare base and tuned model; see `ftdata.train.compare`.

    `done` is called with the number of answers so far, and of all.
    """
    run = finished(run_dir, trust_remote_code=trust_remote_code)
    if data is None:
        run.check_build()
    asked, found = _from_build(run) if data is None else (str(data), of_rows(data, run.recipe))
    stops = run.stops
    pairs = ((document, turn) for document in found if (turn := last_turn(*document, stops)) is not None)
    chosen = list(islice(pairs, n))
    if not chosen:
        hint = "texts alone have a perplexity, in run.json; name questions with --data"
        raise InputRefused("no_questions", f"no row of {asked} has a prompt and an answer", hint=hint)
    texts = [document for document, _ in chosen]
    prompts = [prompt for _, (prompt, _) in chosen]
    tokenizer = run.tokenizer
    expected = [tokenizer.decode(answer) for _, (_, answer) in chosen]
    scores: list[Scores] = []
    answers: list[list[str]] = []
    for number, model in enumerate(_models(run)):

        def tell(so_far: int, before: int = number * len(prompts)) -> None:
            if done is not None:
                done(before + so_far, 2 * len(prompts))

        said = generate(model, prompts, done=tell, **generation)
        answers.append([tokenizer.decode(ids) for ids in said])
        scores.append(scored(answers[-1], expected, perplexity(model, texts)))
    shown = [_asked(tokenizer, ids) for ids in prompts]
    rows = tuple(Answered(*each) for each in zip(shown, expected, *answers, strict=True))
    return Comparison(asked, str(run.about["setup"]["model"]), str(run.model), scores[0], scores[1], rows)


def perplexity(model: Any, texts: Sequence[Document]) -> float:
    """Return the exponential of the mean loss over all trained tokens of documents, each by itself."""
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for ids, labels in texts:
            wanted = torch.tensor(labels)[1:]
            trained = wanted != IGNORE_INDEX
            logits = model(input_ids=torch.tensor([ids]).to(model.device), use_cache=False).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits[trained.to(logits.device)].float(), wanted[trained].to(logits.device), reduction="sum"
            )
            total += float(losses)
            count += int(trained.sum())
    return math.exp(min(total / max(count, 1), 700))


def scored(answers: Sequence[str], expected: Sequence[str], perplexity: float) -> Scores:
    """Return the scores of answers: exact matches, SacreBLEU (Post 2018) and chrF (Popović 2015).

    Blanks at the ends make no difference. BLEU counts words; of languages that are written without blanks, characters.
    """
    exact = sum(answer.strip() == right.strip() for answer, right in zip(answers, expected, strict=True)) / len(
        expected
    )
    tokenize = "char" if _without_blanks(expected) else "13a"
    bleu = sacrebleu.corpus_bleu(list(answers), [list(expected)], tokenize=tokenize).score
    chrf = sacrebleu.corpus_chrf(list(answers), [list(expected)]).score
    return Scores(perplexity, exact, float(bleu), float(chrf))


def _without_blanks(texts: Sequence[str]) -> bool:
    letters = [char for text in texts for char in text if char.isalpha()]
    # Han, kana, Thai, Lao, Khmer and Burmese; Hangul is written with blanks.
    wide = sum("\u0e00" <= char <= "\u0eff" or "\u1000" <= char <= "\u109f" or "\u1780" <= char <= "\u17ff"
               or "\u3040" <= char <= "\u9fff" or "\U00020000" <= char <= "\U0003ffff" for char in letters)  # fmt: skip
    return wide > len(letters) / 2


def _from_build(run: Finished) -> tuple[str, Iterator[Document]]:
    splits = splits_of(load_build(run.build))
    name = "test" if "test" in splits else "train"
    seen = "" if name == "test" else ", which was trained on"
    return f"the {name} split of {run.build}{seen}", documents(splits[name])


def _models(run: Finished) -> Iterator[Any]:
    base = load_base(run, quantization=run.about["setup"]["quantization"])
    own = base.generation_config
    base.generation_config = stopping(base, run)
    yield base
    base.generation_config = own
    yield load_tuned(run, base if run.about["adapter"] else None)


def _asked(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_control=True).strip()
