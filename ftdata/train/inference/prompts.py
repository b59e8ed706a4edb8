"""Encode prompts for inference to the same token ids as in training.

A prompt is everything before the last trained span of a document. To encode a conversation without an answer, a
placeholder answer is appended, and the token ids are cut before it. No template-specific code is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from ftdata.errors import InputRefused
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.recipe import Recipe
from ftdata.readers import reread_rows, resolve_sources
from ftdata.schemas import detect_task
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.train.dataset import to_reference
from ftdata.types import IGNORE_INDEX, ImageReference, Message, Reject, Row, Source

_PLACEHOLDER_ANSWER = "x"


class Document(NamedTuple):
    """The tokens of an example.

    Attributes:
        ids: token ids.
        labels: one label per token.
        images: the images of the example.
    """

    ids: list[int]
    labels: list[int]
    images: Sequence[ImageReference] = ()


class Turn(NamedTuple):
    """The last trained turn of an example.

    Attributes:
        prompt: token ids before the turn.
        images: the images in the prompt.
        answer: token ids of the turn, without its stop token.
    """

    prompt: list[int]
    images: Sequence[ImageReference]
    answer: list[int]


def find_last_turn(document: Document, stops: set[int], recipe: Recipe) -> Turn | None:
    """Divide an example into the prompt and the expected answer, as `split_last_turn` does.

    Args:
        document: the example.
        stops: ids of the stop tokens.
        recipe: the recipe of the build.
    """
    turn = split_last_turn(document.ids, document.labels, stops)
    return None if turn is None else Turn(turn[0], _find_images(turn[0], document.images, recipe), turn[1])


def describe_prompt(turn: Turn, tokenizer: Tokenizer) -> str:
    """Return the text of a prompt without control tokens, after the sizes of its images."""
    images = [f"[image {image.width}×{image.height}]" for image in turn.images]
    return " ".join([*images, tokenizer.decode(turn.prompt, skip_control=True).strip()])


def _find_images(prompt: Sequence[int], images: Sequence[ImageReference], recipe: Recipe) -> Sequence[ImageReference]:
    """Return the images whose tokens are in a prompt. Messages after the answer can have images, too."""
    if recipe.image_processor is None or recipe.image_token_id is None:
        return ()
    tokens = list(prompt).count(recipe.image_token_id)
    for number, image in enumerate(images):
        if tokens <= 0:
            return images[:number]
        tokens -= recipe.image_processor.count_features(image.width, image.height)
    return images


def split_last_turn(ids: Sequence[int], labels: Sequence[int], stops: set[int]) -> tuple[list[int], list[int]] | None:
    """Divide the token ids of an example into the prompt and the expected answer.

    The answer is the last trained span without its stop token. The prompt is every token before this span, so it equals
    the prompt in training. Returns `None` if no prompt precedes the answer.

    >>> split_last_turn([1, 7, 8, 5, 2], [-100, -100, -100, 5, 2], {2})
    ([1, 7, 8], [5])
    """
    end = max((position for position, label in enumerate(labels) if label != IGNORE_INDEX), default=-1) + 1
    start = end
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    # A plain text may be trained from its start, so it has no prompt.
    return (list(ids[:start]), cut_at_stop(list(ids[start:end]), stops)) if start > 1 else None


def cut_at_stop(ids: list[int], stops: set[int]) -> list[int]:
    """Return the token ids before the first stop token."""
    return ids[: next((index for index, id_ in enumerate(ids) if id_ in stops), len(ids))]


def read_documents(split: Any) -> Iterator[Document]:
    """Yield each example of a split, also inside packed sequences.

    For a preference pair, yield the prompt and the chosen answer.
    """
    for row in split:
        if "chosen_ids" in row:
            yield join_side(row, "chosen")
            continue
        images = row.get("images") or ()
        bounds = pairwise(accumulate(row["seq_lengths"], initial=0))
        for number, (start, end) in enumerate(bounds):
            document_images = [to_reference(image) for image in images if image["document"] == number]
            yield Document(row["input_ids"][start:end], row["labels"][start:end], document_images)


def join_side(row: Mapping[str, Any], side: str) -> Document:
    """Return a side of a preference pair, with the prompt."""
    prompt = row["prompt_ids"]
    return Document(prompt + row[f"{side}_ids"], [IGNORE_INDEX] * len(prompt) + row[f"{side}_labels"])


def rebuild_recipe(tokenizer: str, options: Mapping[str, Any]) -> Recipe:
    """Recreate the recipe that rendered and tokenized the rows of a build, from the options in the manifest.

    Args:
        tokenizer: the tokenizer of the build.
        options: the options in the manifest of the build.
    """
    # The mask policy of the build is left out, so that prompts are the same for every policy. Prompts are not pairs.
    # Their images can be in another folder.
    excluded = (
        *("task", "train_on", "train_parts", "reject_flags", "max_length", "overlong"),
        *("image_folder", "download_images"),
    )
    return Recipe.from_manifest(options, tokenizer, excluded=excluded)


def encode_rows(data: Any, recipe: Recipe) -> Iterator[Document]:
    """Render and tokenize each row of the data, and yield its last example.

    Raises:
        InputRefused: a row cannot be built.
    """
    sources = resolve_sources(data)
    if recipe.schema == "auto" and detect_task(reread_rows(sources), recipe.columns) == "preference":
        recipe = replace(recipe, schema="preference")
    for outcome in build_rows(recipe, (row for source in sources for row in source.rows())):
        if isinstance(outcome, Reject):
            where = f"{outcome.source} {outcome.field}".rstrip()
            raise InputRefused(outcome.code, outcome.reason, where=where, hint=outcome.fix)
        example = outcome.examples[-1]
        yield Document(example.input_ids.tolist(), example.labels.tolist(), example.images)


def encode_messages(messages: Sequence[Message], recipe: Recipe) -> list[int]:
    """Return the token ids of a conversation up to the point where the model starts to generate.

    Args:
        messages: the conversation, which ends with a user message.
        recipe: the recipe of the build.

    Raises:
        InputRefused: the template cannot render the conversation.
    """
    reject, recipe = None, replace(recipe, schema="auto", columns=None)
    for row in _candidate_rows(messages):
        (outcome,) = build_rows(recipe, [Row(row, Source("<prompt>", 0))])
        if isinstance(outcome, Reject):
            reject = reject or outcome
        elif turn := split_last_turn(
            outcome.examples[-1].input_ids.tolist(), outcome.examples[-1].labels.tolist(), set()
        ):
            return turn[0]
    if reject is None:
        raise InputRefused("no_questions", "the template prints no text before the answer", where="<prompt>")
    raise InputRefused(reject.code, reject.reason, where="<prompt>", hint=reject.fix)


def _candidate_rows(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    """Yield the conversation as rows with different columns, because prompt templates read different columns."""
    yield {"messages": [*messages, {"role": "assistant", "content": _PLACEHOLDER_ANSWER}]}
    if len(messages) == 1:
        text = messages[0]["content"]
        yield {"question": text, "answer": _PLACEHOLDER_ANSWER}
        yield {"instruction": text, "input": "", "output": _PLACEHOLDER_ANSWER}
        yield {"prompt": text, "completion": _PLACEHOLDER_ANSWER}
