"""Generate: token ids of prompts to token ids of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ftdata.errors import InputRefused, UsageError
from ftdata.train.inference.progress import GenerationStep
from ftdata.train.inference.prompts import cut_at_stop
from ftdata.train.model.device import fit_threads

_GREEDY = {"max_new_tokens": 256, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def generate_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    progress: Callable[[GenerationStep], None] | None = None,
    seed: int = 0,
    **options: Any,
) -> list[list[int]]:
    """Return the ids that the model answers to each prompt, up to and without its stop token.

    Prompts of like length are generated together, so that little is padded; answers come in the order of the prompts.

    Args:
        model: a causal language model; its generation config says where it stops and what pads on the left.
        prompts: token ids.
        batch_size: prompts generated together.
        progress: called after each token of a batch.
        seed: decides what is sampled, where anything is.
        options: further arguments of `model.generate`, such as `num_beams`; greedy without.

    Raises:
        UsageError: `model.generate` refuses the options.
        InputRefused: a prompt is longer than the model has positions, or holds a token that it has no embedding for.
    """
    stops, pad_id = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    stop_ids = set(stops if isinstance(stops, list) else [stops])
    given = {**_GREEDY, "pad_token_id": pad_id, **options}
    if given["do_sample"]:
        torch.manual_seed(seed)
        given = {name: value for name, value in given.items() if value is not None}
    most = given["max_new_tokens"]
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    report = TokenReporter(progress, -(-len(order) // batch_size), most)
    if progress is not None:
        given["stopping_criteria"] = [*(given.get("stopping_criteria") or ()), report]
    answers: list[list[int]] = [[] for _ in prompts]
    room = _room(model, prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _without_router(model), fit_threads(model):
            for at in range(0, len(order), batch_size):
                chosen = order[at : at + batch_size]
                width = len(prompts[chosen[-1]])
                ids = torch.tensor([_left([pad_id], prompts[number], width) for number in chosen])
                mask = torch.tensor([_left([0], [1] * len(prompts[number]), width) for number in chosen])
                given["max_new_tokens"] = min(most, room - width)
                output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **given)
                for number, found in zip(chosen, output[:, width:].tolist(), strict=True):
                    answers[number] = cut_at_stop(found, stop_ids)
                report.end_batch(at + len(chosen))
    except (ValueError, TypeError) as error:
        raise UsageError("generation", f"generate refuses: {' '.join(str(error).split())[:300]}") from None
    finally:
        model.train(was_training)
    return answers


class TokenReporter:
    """Reports each token that a model generates: a criterion of stopping that never stops.

    Args:
        progress: called with each step.
        batches: how many there are.
        most: tokens of an answer at most.
    """

    def __init__(self, progress: Callable[[GenerationStep], None] | None, batches: int, most: int) -> None:
        self._progress, self._batches, self._most = progress, batches, most
        self._batch = self._token = self._answers = 0

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
        """Report a token of the running batch, and let it go on."""
        del scores
        self._token += 1
        self._report(ended=False)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def end_batch(self, answers: int) -> None:
        """Report that the running batch has its answers, which makes so many in all."""
        self._answers = answers
        self._report(ended=True)
        self._batch, self._token = self._batch + 1, 0

    def _report(self, *, ended: bool) -> None:
        if self._progress is not None:
            step = GenerationStep(self._batch, self._batches, self._token, self._most, self._answers, ended)
            self._progress(step)


def max_positions(model: Any) -> int:
    """Return how many tokens a model can tell apart by their place."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _room(model: Any, prompts: Sequence[Sequence[int]]) -> int:
    room, rows = max_positions(model), int(model.get_input_embeddings().weight.shape[0])
    longest = max(map(len, prompts), default=0)
    if longest >= room:
        raise InputRefused("prompt_too_long", f"a prompt has {longest:,} tokens, the model has {room:,} positions")
    unknown = max((max(ids) for ids in prompts if ids), default=0)
    if unknown >= rows:
        raise InputRefused(
            "vocabulary",
            f"a prompt holds token id {unknown}, the model has {rows:,} embeddings",
            hint="it has a token that training has not seen: leave it out",
        )
    return room


@contextmanager
def _without_router(model: Any) -> Iterator[None]:
    # Of a step of generation, the loss that balances experts would be told from the mask of the whole prompt.
    config = model.config.get_text_config()
    before = getattr(config, "output_router_logits", None)
    if before:
        config.output_router_logits = False
    try:
        yield
    finally:
        if before:
            config.output_router_logits = before


def _left(filler: list[int], ids: Sequence[int], width: int) -> list[int]:
    return filler * (width - len(ids)) + list(ids)
