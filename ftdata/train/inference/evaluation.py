"""Evaluate the base model and the tuned model on the same prompts."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
import torch
from numpy.typing import NDArray

from ftdata.build.dataset import load_build
from ftdata.errors import InputRefused
from ftdata.redaction import redact_text
from ftdata.tokenizing.load import load_tokenizer
from ftdata.train.dataset import desirable_rows, has_pairs, training_splits
from ftdata.train.inference.chat import base_generation_config
from ftdata.train.inference.comparison_report import ComparedAnswer, Comparison, Scores
from ftdata.train.inference.generation import BatchInputs, batch_images, generate_ids, move_inputs
from ftdata.train.inference.progress import GenerationProgress, ProgressMeter
from ftdata.train.inference.prompts import (
    Document,
    describe_prompt,
    encode_rows,
    find_last_turn,
    join_side,
    read_documents,
)
from ftdata.train.inference.run_dir import FinishedRun, load_base_model, load_tuned_model, open_run
from ftdata.train.model.device import fit_threads
from ftdata.train.model.load import load_trainer_tokenizer
from ftdata.train.model.vision import ImagePreprocessor, make_image_preprocessor
from ftdata.types import IGNORE_INDEX

_MAX_BATCH_TOKENS = 4096
"""Maximum number of tokens per forward pass, unless a single document is longer."""


def compare_models(
    run_dir: Path,
    data: Any,
    n: int | None,
    *,
    trust_remote_code: bool = False,
    progress: Callable[[GenerationProgress], None] | None = None,
    batch_size: int = 16,
    image_folder: str | None = None,
    download_images: bool = False,
    **generation: Any,
) -> Comparison:
    """Compare the base model and the tuned model of a run on the same prompts.

    See `ftdata.train.compare`. `progress` is called after each token.
    """
    run = open_run(run_dir, trust_remote_code=trust_remote_code)
    run.check_generates()
    recipe = run.recipe
    if data is None:
        run.check_build()
        data_name, examples = _read_build_rows(run)
    else:
        recipe = replace(recipe, image_folder=image_folder, download_images=download_images)
        data_name, examples = redact_text(str(data)), zip(encode_rows(data, recipe), repeat(None))
    stop_ids = run.stop_ids
    candidates = (
        (document, turn, other)
        for document, other in examples
        if (turn := find_last_turn(document, stop_ids, recipe)) is not None
    )
    selected = list(islice(candidates, n))
    if not selected:
        hint = "use --data to pass rows with a prompt and an answer; the perplexity of plain texts is in run.json"
        raise InputRefused("no_questions", f"no row of {data_name} has a prompt and an answer", hint=hint)
    texts = [document for document, _, _ in selected]
    others = [other for _, _, other in selected if other is not None]
    turns = [turn for _, turn, _ in selected]
    prompts = [turn.prompt for turn in turns]
    tokenizer = run.tokenizer
    expected = [tokenizer.decode(turn.answer) for turn in turns]
    scores: list[Scores] = []
    answers: list[list[str]] = []
    meter = ProgressMeter(len(prompts), 2, progress) if progress else None

    def evaluate_model(model: Any) -> None:
        preprocessor = _make_preprocessor(run, model) if any(text.images for text in texts) else None
        image_inputs = batch_images(preprocessor, [turn.images for turn in turns])
        answer_ids = generate_ids(
            model, prompts, batch_size=batch_size, image_inputs=image_inputs, progress=meter, **generation
        )
        answers.append([tokenizer.decode(ids) for ids in answer_ids])
        image_inputs = batch_images(preprocessor, [text.images for text in texts])
        losses, counts = compute_losses(model, texts, batch_size, image_inputs)
        scores.append(score_answers(answers[-1], expected, _perplexity(losses, counts)))
        if others:
            other_losses, other_counts = compute_losses(model, others, batch_size)
            preferred = float((losses < other_losses).mean())
            other_perplexity = _perplexity(other_losses, other_counts)
            scores[-1] = replace(scores[-1], rejected_perplexity=other_perplexity, preferred=preferred)
        if meter is not None:
            meter.next_model()

    _evaluate_both(run, evaluate_model)
    questions = [describe_prompt(turn, tokenizer) for turn in turns]
    rows = tuple(ComparedAnswer(*columns) for columns in zip(questions, expected, *answers, strict=True))
    return Comparison(data_name, str(run.metadata["setup"]["model"]), str(run.model), scores[0], scores[1], rows)


def perplexity(model: Any, texts: Sequence[Document], batch_size: int = 16) -> float:
    """Return a model's perplexity on tokenized examples: the exponential of the mean loss per trained token."""
    return _perplexity(*compute_losses(model, texts, batch_size))


def _perplexity(losses: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    return math.exp(min(float(losses.sum()) / max(int(counts.sum()), 1), 700))


def compute_losses(
    model: Any, texts: Sequence[Document], batch_size: int = 16, image_inputs: BatchInputs | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the sum of the losses and the number of the trained tokens of each tokenized example (`[texts]`).

    Documents of similar length share a forward pass, with padding on the right.

    Args:
        model: the model.
        texts: the tokenized examples.
        batch_size: maximum number of examples per forward pass.
        image_inputs: returns the inputs for the images of a batch; `None` if the examples have no images.
    """
    losses, counts = np.zeros(len(texts)), np.zeros(len(texts), np.int64)
    model.eval()
    with torch.inference_mode(), fit_threads(model):
        for numbers in _batches(texts, batch_size):
            batch = [texts[number] for number in numbers]
            width = max(len(text.ids) for text in batch)
            ids = torch.tensor([[*text.ids] + [0] * (width - len(text.ids)) for text in batch])
            mask = torch.tensor([[1] * len(text.ids) + [0] * (width - len(text.ids)) for text in batch])
            labels = [[*text.labels] + [IGNORE_INDEX] * (width - len(text.labels)) for text in batch]
            targets = torch.tensor(labels)[:, 1:]
            trained = targets != IGNORE_INDEX
            inputs = move_inputs(model, ids, mask, image_inputs(ids, numbers) if image_inputs else {})
            logits = model(**inputs, use_cache=False).logits[:, :-1]
            token_losses = torch.zeros(targets.shape, dtype=torch.float64)
            token_losses[trained] = torch.nn.functional.cross_entropy(
                logits[trained.to(logits.device)].float(), targets[trained].to(logits.device), reduction="none"
            ).to(token_losses)
            losses[numbers], counts[numbers] = token_losses.sum(1).numpy(), trained.sum(1).numpy()
    return losses, counts


def _batches(texts: Sequence[Document], batch_size: int) -> Iterator[list[int]]:
    """Sort tokenized examples by length, and yield their numbers in batches.

    The number of tokens per batch is limited, because all logits of a batch are in memory.
    """
    batch: list[int] = []
    for number in sorted(range(len(texts)), key=lambda number: len(texts[number].ids)):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(texts[number].ids) > _MAX_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def score_answers(answers: Sequence[str], expected: Sequence[str], perplexity: float) -> Scores:
    """Score answers against the expected answers: exact match, SacreBLEU (Post 2018) and chrF (Popović 2015).

    Leading and trailing whitespace is ignored. BLEU compares words, or characters if most characters belong to scripts
    that do not separate words with spaces.
    """
    pairs = zip(answers, expected, strict=True)
    exact = sum(answer.strip() == target.strip() for answer, target in pairs) / len(expected)
    tokenize = "char" if _is_unspaced(expected) else "13a"
    bleu = sacrebleu.corpus_bleu(list(answers), [list(expected)], tokenize=tokenize).score
    chrf = sacrebleu.corpus_chrf(list(answers), [list(expected)]).score
    return Scores(perplexity, exact, float(bleu), float(chrf))


def _is_unspaced(texts: Sequence[str]) -> bool:
    chars = [char for text in texts for char in text if char.isalpha()]
    # Han, kana, Thai, Lao, Khmer and Burmese. Hangul is not included because it separates words with spaces.
    wide = sum("\u0e00" <= char <= "\u0eff" or "\u1000" <= char <= "\u109f" or "\u1780" <= char <= "\u17ff"
               or "\u3040" <= char <= "\u9fff" or "\U00020000" <= char <= "\U0003ffff" for char in chars)  # fmt: skip
    return wide > len(chars) / 2


def _read_build_rows(run: FinishedRun) -> tuple[str, Iterator[tuple[Document, Document | None]]]:
    """Return a description of the split that is evaluated, and its examples.

    With each chosen side of a preference pair, the rejected side is returned.
    """
    splits = training_splits(load_build(run.build))
    name = "test" if "test" in splits else "train"
    note, split = "" if name == "test" else ", which the model was trained on", desirable_rows(splits[name])
    rows: Iterator[tuple[Document, Document | None]] = zip(read_documents(split), repeat(None))
    if has_pairs(split):
        rows = ((join_side(row, "chosen"), join_side(row, "rejected")) for row in split)
    return f"the {name} split of {run.build}{note}", rows


def _make_preprocessor(run: FinishedRun, model: Any) -> ImagePreprocessor:
    """Create the image preprocessor of a model of a run."""
    name = run.metadata["tokenizer"]
    tokenizer = load_trainer_tokenizer(name, trust_remote_code=run.trust_remote_code)
    return make_image_preprocessor(model, tokenizer, load_tokenizer(name).folder, run.build)


def _evaluate_both(run: FinishedRun, evaluate_model: Callable[[Any], None]) -> None:
    """Load and evaluate the base model, then load and evaluate the tuned model.

    An adapter is added to the loaded base model, so the base weights are loaded and quantized only once. Disabling the
    adapter to evaluate the base model would be incorrect, because initializations such as `pissa` and trained biases
    change the base weights. Two full models are never in memory together.
    """
    base = load_base_model(run, quantization=run.metadata["setup"]["quantization"], answers=True)
    generation_config = base.generation_config
    base.generation_config = base_generation_config(base, run)
    evaluate_model(base)
    base.generation_config = generation_config
    if run.metadata["adapter"]:
        evaluate_model(load_tuned_model(run, base))
        return
    del base
    gc.collect()
    evaluate_model(load_tuned_model(run))
