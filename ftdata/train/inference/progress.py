"""Measure the progress of generation and estimate the remaining time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class GenerationStep(NamedTuple):
    """The state of a generation after a new token or at the end of a batch.

    Attributes:
        batch: index of the batch.
        batches: number of batches.
        token: number of tokens that the batch has generated so far.
        max_tokens: maximum number of tokens that the batch generates.
        answers: number of prompts with an answer, in all batches.
        ended: whether the batch is complete.
    """

    batch: int
    batches: int
    token: int
    max_tokens: int
    answers: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class GenerationProgress:
    """The number of completed answers and forward passes, and the estimated remaining time of a generation.

    Attributes:
        answers: number of prompts with an answer.
        of_answers: number of prompts, counted once for each model.
        steps: number of forward passes that generate a token, including those skipped because a batch ended early.
        of_steps: maximum number of forward passes.
        seconds_per_step: measured time of a forward pass; `None` before the second token.
        seconds_left: upper bound of the remaining time; `None` before the second token.
    """

    answers: int
    of_answers: int
    steps: int
    of_steps: int
    seconds_per_step: float | None
    seconds_left: float | None


class ProgressMeter:
    """Measures the speed of generation, and reports the overall progress of one or more models.

    Args:
        prompts: number of prompts for each model.
        models: number of models.
        show: called with the progress after each token.
    """

    def __init__(self, prompts: int, models: int, show: Callable[[GenerationProgress], None]) -> None:
        self._prompts, self._models, self._show = prompts, models, show
        self._model = 0
        self._previous: float | None = None
        self._seconds, self._timed_steps = 0.0, 0

    def next_model(self) -> None:
        """Start counting the generation steps of the next model."""
        self._model += 1
        self._previous = None

    def __call__(self, step: GenerationStep) -> None:
        """Record a generation step of the current model, and report the overall progress of all models."""
        now = time.perf_counter()
        # The first token of a batch includes the time for the prompt, so it is not measured.
        if self._previous is not None and not step.ended and step.token > 1:
            self._seconds += now - self._previous
            self._timed_steps += 1
        self._previous = now
        model_steps = step.batches * step.max_tokens
        done = (step.batch + 1) * step.max_tokens if step.ended else step.batch * step.max_tokens + step.token
        done += self._model * model_steps
        steps = self._models * model_steps
        per_step = self._seconds / self._timed_steps if self._timed_steps else None
        left = None if per_step is None else per_step * (steps - done)
        answers = self._model * self._prompts + step.answers
        self._show(GenerationProgress(answers, self._models * self._prompts, done, steps, per_step, left))
