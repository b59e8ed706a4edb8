"""Evaluate: the base model and the tuned one, asked the same questions."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import sacrebleu
import torch

from ftdata.build.dataset import load_build
from ftdata.errors import InputRefused
from ftdata.redaction import redact_text
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.train.dataset import training_splits
from ftdata.train.inference.chat import base_generation_config
from ftdata.train.inference.comparison_report import ComparedAnswer, Comparison, Scores
from ftdata.train.inference.generation import generate_ids
from ftdata.train.inference.progress import GenerationProgress, ProgressMeter
from ftdata.train.inference.prompts import encode_rows, read_documents, split_last_turn
from ftdata.train.inference.run_dir import FinishedRun, load_base_model, load_tuned_model, open_run
from ftdata.train.model.device import fit_threads
from ftdata.types import IGNORE_INDEX

_TOKENS_AT_ONCE = 4096
"""Tokens whose logits are computed in one forward pass, unless one document has more."""

Document = tuple[list[int], list[int]]
"""Ids and labels."""


def compare_models(
    run_dir: Path,
    data: Any,
    n: int | None,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[GenerationProgress], None] | None = None,
    batch_size: int = 16,
    **generation: Any,
) -> Comparison:
    """Compare base and tuned model; see `ftdata.train.compare`.

    `progress` is called after each token.
    """
    run = open_run(run_dir, trust_remote_code=trust_remote_code)
    if data is None:
        run.check_build()
    asked, found = _from_build(run) if data is None else (redact_text(str(data)), encode_rows(data, run.recipe))
    stops = run.stops
    pairs = ((document, turn) for document in found if (turn := split_last_turn(*document, stops)) is not None)
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
    meter = ProgressMeter(len(prompts), 2, progress) if progress else None

    def ask(model: Any) -> None:
        found = generate_ids(model, prompts, batch_size=batch_size, progress=meter, **generation)
        answers.append([tokenizer.decode(ids) for ids in found])
        scores.append(score_answers(answers[-1], expected, perplexity(model, texts, batch_size)))
        if meter is not None:
            meter.next_model()

    _ask_both(run, ask)
    shown = [_asked(tokenizer, ids) for ids in prompts]
    rows = tuple(ComparedAnswer(*each) for each in zip(shown, expected, *answers, strict=True))
    return Comparison(asked, str(run.about["setup"]["model"]), str(run.model), scores[0], scores[1], rows)


def perplexity(model: Any, texts: Sequence[Document], batch_size: int = 16) -> float:
    """Return the exponential of the mean loss over all trained tokens of documents, each by itself.

    Documents of like length share a forward pass, padded on the right.
    """
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode(), fit_threads(model):
        for batch in _batches(texts, batch_size):
            width = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
            wanted = torch.tensor([labels + [IGNORE_INDEX] * (width - len(labels)) for _, labels in batch])[:, 1:]
            trained = wanted != IGNORE_INDEX
            inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits[trained.to(logits.device)].float(), wanted[trained].to(logits.device), reduction="sum"
            )
            total += float(losses)
            count += int(trained.sum())
    return math.exp(min(total / max(count, 1), 700))


def _batches(texts: Sequence[Document], batch_size: int) -> Iterator[list[Document]]:
    """Yield documents by their length, as many together as hold few enough tokens: their logits are all in memory."""
    batch: list[Document] = []
    for text in sorted(texts, key=lambda text: len(text[0])):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(text[0]) > _TOKENS_AT_ONCE):
            yield batch
            batch = []
        batch.append((list(text[0]), list(text[1])))
    if batch:
        yield batch


def score_answers(answers: Sequence[str], expected: Sequence[str], perplexity: float) -> Scores:
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


def _from_build(run: FinishedRun) -> tuple[str, Iterator[Document]]:
    splits = training_splits(load_build(run.build))
    name = "test" if "test" in splits else "train"
    seen = "" if name == "test" else ", which was trained on"
    return f"the {name} split of {run.build}{seen}", read_documents(splits[name])


def _ask_both(run: FinishedRun, ask: Callable[[Any], None]) -> None:
    """Ask the base model, then the tuned one.

    An adapter is put on the base model that is loaded already, so the weights are loaded, and quantized, once. To put
    it on and switch it off for the base model would not be the same: initializations such as `pissa`, and trained
    biases, change the base weights themselves. Of two whole models, one is in memory at a time.
    """
    base = load_base_model(run, quantization=run.about["setup"]["quantization"], answers=True)
    own = base.generation_config
    base.generation_config = base_generation_config(base, run)
    ask(base)
    base.generation_config = own
    if run.about["adapter"]:
        ask(load_tuned_model(run, base))
        return
    del base
    gc.collect()
    ask(load_tuned_model(run))


def _asked(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_control=True).strip()
