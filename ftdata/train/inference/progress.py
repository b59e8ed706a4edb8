"""Progress of answering: how many prompts and tokens are done, and how long the rest takes at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class GenerationStep(NamedTuple):
    """The state of a generation after each token.

    Attributes:
        batch: its number, from 0.
        batches: how many there are.
        token: tokens that the batch has generated so far.
        most: tokens that it generates at most.
        answers: prompts of all batches that have an answer.
        ended: whether the batch has its answers.
    """

    batch: int
    batches: int
    token: int
    most: int
    answers: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class GenerationProgress:
    """How far answering is.

    Attributes:
        answers: prompts that have an answer.
        of_answers: all prompts, once for each model that is asked.
        steps: forward passes that generate a token, done or left out because a batch ended early.
        of_steps: at most.
        seconds_per_step: measured; `None` before the second token.
        seconds_left: at most; `None` before the second token.
    """

    answers: int
    of_answers: int
    steps: int
    of_steps: int
    seconds_per_step: float | None
    seconds_left: float | None


class ProgressMeter:
    """Turns the steps of one or more models into progress.

    Args:
        prompts: the number of prompts that each model is asked.
        models: the number of models.
        show: called with the progress after each token.
    """

    def __init__(self, prompts: int, models: int, show: Callable[[GenerationProgress], None]) -> None:
        self._prompts, self._models, self._show = prompts, models, show
        self._model = 0
        self._previous: float | None = None
        self._seconds, self._timed = 0.0, 0

    def next_model(self) -> None:
        """Count the steps that follow as those of the next model."""
        self._model += 1
        self._previous = None

    def __call__(self, step: GenerationStep) -> None:
        """Take the state of the running model, and show the progress of all."""
        now = time.perf_counter()
        # The first token of a batch waits for its whole prompt, so it is not like the others.
        if self._previous is not None and not step.ended and step.token > 1:
            self._seconds += now - self._previous
            self._timed += 1
        self._previous = now
        each = step.batches * step.most
        done = (step.batch + 1) * step.most if step.ended else step.batch * step.most + step.token
        done += self._model * each
        per_step = self._seconds / self._timed if self._timed else None
        left = None if per_step is None else per_step * (self._models * each - done)
        answers = self._model * self._prompts + step.answers
        self._show(GenerationProgress(answers, self._models * self._prompts, done, self._models * each, per_step, left))
