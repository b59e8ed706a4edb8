"""Generate answers with a model. Prompts and answers are lists of token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ftdata.errors import FtdataError, InputRefused, UsageError, describe_exception
from ftdata.train.inference.progress import GenerationStep
from ftdata.train.inference.prompts import cut_at_stop
from ftdata.train.model.device import fit_threads
from ftdata.train.model.vision import ImagePreprocessor
from ftdata.types import ImageReference

BatchInputs = Callable[[torch.Tensor, Sequence[int]], dict[str, Any]]
"""Returns the inputs for the images of a batch, given its token ids (int64 `[texts, tokens]`) and the numbers of its
texts."""

_GREEDY = {"max_new_tokens": 256, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def generate_ids(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    image_inputs: BatchInputs | None = None,
    progress: Callable[[GenerationStep], None] | None = None,
    seed: int = 0,
    **options: Any,
) -> list[list[int]]:
    """Generate an answer to each prompt. Return the token ids of the answers, without stop tokens.

    Prompts of similar length are batched together to reduce padding. The answers are in the order of the prompts.

    Args:
        model: a causal language model; its generation config contains the stop tokens and the token for left padding.
        prompts: token ids of the prompts.
        batch_size: number of prompts per batch.
        image_inputs: returns the inputs for the images of a batch; `None` if the prompts have no images.
        progress: called after each token of a batch.
        seed: random seed for sampling.
        options: further arguments of `model.generate`, such as `num_beams`; the default is greedy decoding.

    Raises:
        UsageError: `model.generate` rejects the options.
        InputRefused: a prompt has more tokens than the model has positions, or contains a token without an embedding.
    """
    stops, pad_id = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    stop_ids = set(stops if isinstance(stops, list) else [stops])
    arguments = {**_GREEDY, "pad_token_id": pad_id, **options}
    if arguments["do_sample"]:
        torch.manual_seed(seed)
        arguments = {name: value for name, value in arguments.items() if value is not None}
    max_new_tokens = arguments["max_new_tokens"]
    repeated = [name for name in ("num_beams", "num_return_sequences") if arguments.get(name, 1) > 1]
    if image_inputs and repeated:
        # Some models repeat the images of a batch in another order than its prompts.
        problem = f"{repeated[0]}={arguments[repeated[0]]} is not supported for prompts with images"
        raise UsageError("generation", problem, hint=f"remove {repeated[0]}")
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    reporter = TokenReporter(progress, -(-len(order) // batch_size), max_new_tokens)
    if progress is not None:
        arguments["stopping_criteria"] = [*(arguments.get("stopping_criteria") or ()), reporter]
    answers: list[list[int]] = [[] for _ in prompts]
    positions = _check_prompts(model, prompts)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), _without_router(model), fit_threads(model):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                width = len(prompts[batch[-1]])
                ids = torch.tensor([_pad_left([pad_id], prompts[number], width) for number in batch])
                mask = torch.tensor([_pad_left([0], [1] * len(prompts[number]), width) for number in batch])
                arguments["max_new_tokens"] = min(max_new_tokens, positions - width)
                inputs = move_inputs(model, ids, mask, image_inputs(ids, batch) if image_inputs else {})
                output = model.generate(**inputs, **arguments)
                for number, answer in zip(batch, output[:, width:].tolist(), strict=True):
                    answers[number] = cut_at_stop(answer, stop_ids)
                reporter.end_batch(start + len(batch))
    except FtdataError:
        raise
    except (ValueError, TypeError) as error:
        message = f"model.generate rejects the options: {describe_exception(error)}"
        raise UsageError("generation", message) from None
    finally:
        model.train(was_training)
    return answers


def batch_images(
    preprocessor: ImagePreprocessor | None, images: Sequence[Sequence[ImageReference]]
) -> BatchInputs | None:
    """Return a function that computes the inputs for the images of a batch.

    Args:
        preprocessor: the preprocessor of the model; `None` if the texts have no images.
        images: the images of each text.

    Returns:
        The function; `None` if the texts have no images.
    """
    if preprocessor is None:
        return None

    def compute_inputs(ids: torch.Tensor, numbers: Sequence[int]) -> dict[str, Any]:
        batch = [image for number in numbers for image in images[number]]
        return preprocessor.compute_inputs(ids, preprocessor.load(batch))

    return compute_inputs


def move_inputs(model: Any, ids: torch.Tensor, mask: torch.Tensor, image_inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a batch on the device of a model. Pixels are converted to the dtype of the model."""
    inputs = {"input_ids": ids, "attention_mask": mask, **image_inputs}
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in inputs.items()
    }


class TokenReporter:
    """A stopping criterion for `model.generate` that reports each generated token and never stops the generation.

    Args:
        progress: called with each step.
        batches: number of batches.
        max_tokens: maximum number of tokens of an answer.
    """

    def __init__(self, progress: Callable[[GenerationStep], None] | None, batches: int, max_tokens: int) -> None:
        self._progress, self._step = progress, GenerationStep(0, batches, 0, max_tokens, 0)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
        """Report one more token of the current batch. Return false for every prompt, to continue the generation."""
        del scores
        self._report(self._step._replace(token=self._step.token + 1))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def end_batch(self, answers: int) -> None:
        """Report the end of the current batch.

        Args:
            answers: number of prompts that have an answer, in all batches so far.
        """
        self._report(self._step._replace(answers=answers, ended=True))
        self._step = self._step._replace(batch=self._step.batch + 1, token=0, ended=False)

    def _report(self, step: GenerationStep) -> None:
        self._step = step
        if self._progress is not None:
            self._progress(step)


def max_positions(model: Any) -> int:
    """Return the maximum number of tokens in a sequence, or 2**30 if the model has no limit."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


def _check_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> int:
    """Check that no prompt is too long or contains a token without an embedding. Return the maximum length."""
    positions, rows = max_positions(model), int(model.get_input_embeddings().weight.shape[0])
    number, longest = max(enumerate(map(len, prompts), 1), key=lambda item: item[1], default=(0, 0))
    if longest >= positions:
        place = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
        message = f"{place} has {longest:,} tokens, but the model accepts at most {positions:,} tokens"
        raise InputRefused("prompt_too_long", message, hint="shorten it, or leave out its row")
    largest = max((max(ids) for ids in prompts if ids), default=0)
    if largest >= rows:
        message = f"a prompt contains token id {largest}, but the model has only {rows:,} embeddings"
        hint = "remove this token from the prompt: the model was trained without it"
        raise InputRefused("vocabulary", message, hint=hint)
    return positions


@contextmanager
def _without_router(model: Any) -> Iterator[None]:
    # With router logits, the model would compute the load-balancing loss of a single token with the attention mask
    # of the whole prompt.
    config = model.config.get_text_config()
    before = getattr(config, "output_router_logits", None)
    if before:
        config.output_router_logits = False
    try:
        yield
    finally:
        if before:
            config.output_router_logits = before


def _pad_left(filler: list[int], ids: Sequence[int], width: int) -> list[int]:
    return filler * (width - len(ids)) + list(ids)
