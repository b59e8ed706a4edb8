"""Find the texts of a conversation in the result of a function, by calling the function with markers in their place."""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, count
from typing import Any

from ftdata.templates.attribution.tracked_strings import TrackedString

_MARKER = re.compile(r"qzx(\d{6})kzq")


def untrack(value: Any) -> Any:
    """Copy a value, with plain strings in place of tracked strings."""
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {untrack(key): untrack(item) for key, item in value.items()}
    return [untrack(item) for item in value] if isinstance(value, list | tuple) else value


_FIXED_KEYS = {"id", "role", "tool_call_id", "type"}
"""Keys whose values functions check."""


def map_messages(value: Any, change: Callable[[TrackedString], str], *, is_data: bool = False) -> Any:
    """Copy a value, with the result of `change` in place of each text that a marker can replace.

    Args:
        value: messages, or a part of them.
        change: called with each text, always in the same order.
        is_data: whether the keys of objects are texts, as in the arguments of tool calls.
    """
    if isinstance(value, TrackedString):
        # Functions test texts for truth, and often omit blank texts.
        return change(value) if str.strip(value) else str.__str__(value)
    if isinstance(value, Mapping):
        copy = dict[Any, Any]()
        for key, item in value.items():
            name = map_messages(key, change, is_data=True) if is_data else untrack(key)
            is_fixed = not is_data and key in _FIXED_KEYS
            is_inner_data = is_data or key == "arguments"
            copy[name] = untrack(item) if is_fixed else map_messages(item, change, is_data=is_inner_data)
        return copy
    return [map_messages(item, change, is_data=is_data) for item in value] if isinstance(value, list | tuple) else value


_TOOL_TEXTS = {"description", "enum", "name", "required", "title"}
"""Keys of tool definitions whose texts belong to the data. The keys of `properties` do, too."""


def map_tools(tools: Any, change: Callable[[TrackedString], str]) -> Any:
    """Copy tool definitions like `map_messages`. Equal texts get equal results, because schemas refer to names."""
    results = dict[str, str]()

    def change_once(value: Any) -> Any:
        if isinstance(value, list):
            return [change_once(item) for item in value]
        if not isinstance(value, str) or not str.strip(value):
            return untrack(value)
        if value not in results:
            results[str.__str__(value)] = change(TrackedString.from_str(value))
        return results[value]

    def walk(value: Any, *, has_names: bool = False) -> Any:
        if isinstance(value, Mapping):
            return {
                (change_once(key) if has_names else untrack(key)): change_once(item)
                if key in _TOOL_TEXTS and not has_names and not isinstance(item, Mapping)
                else walk(item, has_names=key == "properties" and not has_names)
                for key, item in value.items()
            }
        return [walk(item) for item in value] if isinstance(value, list | tuple) else untrack(value)

    return walk(tools)


_MapTexts = Callable[[Any, Callable[[TrackedString], str]], Any]


def attribute(
    text: str, value: Any, map_texts: _MapTexts, render: Callable[[Any], str | None]
) -> list[tuple[int, int]]:
    """Find the texts of a value in a rendered text.

    Args:
        text: the rendered text.
        value: messages or tool definitions.
        map_texts: `map_messages` or `map_tools`.
        render: renders another value, or returns `None` if the function fails.

    Returns:
        The length and the owner of each range of the text. An empty list if no text of the value can be attributed.
    """
    texts = list[TrackedString]()

    def collect(item: TrackedString) -> str:
        texts.append(item)
        return item

    def align(numbers: Iterable[int]) -> list[tuple[int, int]] | None:
        counter, marked = count(), frozenset(numbers)

        def mark(item: TrackedString) -> str:
            number = next(counter)
            return f"qzx{number:06}kzq" if number in marked else str.__str__(item)

        rendered = render(map_texts(value, mark))
        return None if rendered is None else _align(text, texts, rendered)

    def find_markable(numbers: Sequence[int]) -> list[int]:
        """Return the numbers of the texts that the function does not read, by bisection."""
        if align(numbers) is not None:
            return [*numbers]
        half = len(numbers) // 2
        return [*find_markable(numbers[:half]), *find_markable(numbers[half:])] if half else []

    map_texts(value, collect)
    if not texts:
        return []
    if (runs := align(range(len(texts)))) is not None:
        return runs
    return align(find_markable(range(len(texts)))) or []


def merge_runs(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge two attributions of a text. The first one has precedence.

    >>> merge_runs([(4, 0), (2, 8)], [(2, 5), (4, 0)])
    [(2, 5), (2, 0), (2, 8)]
    """
    if not first or not second:
        return [*(first or second)]
    ends = [[*accumulate(size for size, _ in runs)] for runs in (first, second)]
    merged, start = list[tuple[int, int]](), 0
    for end in sorted({*ends[0], *ends[1]}):
        owners = [runs[bisect(edges, start)][1] for runs, edges in zip((first, second), ends, strict=True)]
        merged.append((end - start, owners[0] or owners[1]))
        start = end
    return merged


def _align(text: str, texts: Sequence[TrackedString], marked: str) -> list[tuple[int, int]] | None:
    """Return the length and the owner of each range of a text, or `None` if the marked text has another structure.

    >>> _align("<u>Hi</u>", [TrackedString("Hi ", [(3, 8)])], "<u>qzx000000kzq</u>")
    [(3, 0), (2, 8), (4, 0)]
    """
    pieces = _MARKER.split(marked)
    numbers = [int(number) for number in pieces[1::2]]
    if any(number >= len(texts) for number in numbers) or not text.startswith(pieces[0]):
        return None
    ends = _find_ends(text, texts, numbers, pieces[2::2], len(pieces[0]))
    if ends is None:
        return None
    runs, position = [(len(pieces[0]), 0)], len(pieces[0])
    for number, gap, end in zip(numbers, pieces[2::2], ends, strict=True):
        owner = texts[number].runs[0][1] if texts[number].runs else 0
        runs += [(end - position, owner), (len(gap), 0)]
        position = end + len(gap)
    return [run for run in runs if run[0]]


def _find_ends(
    text: str, texts: Sequence[str], numbers: Sequence[int], gaps: Sequence[str], start: int
) -> list[int] | None:
    """Return the end of each text, so that the gaps between the texts fit, too; `None` if no ends fit.

    The search goes from text to text, and back to the previous one if no form of the next one fits.
    """
    ends = list[int]()
    choices = list[Iterator[int]]()
    position = start
    while True:
        if len(choices) == len(ends):
            if len(ends) == len(numbers):
                if position == len(text):
                    return ends
            else:
                number = len(choices)
                choices.append(_possible_ends(text, position, texts[numbers[number]], gaps[number]))
        end = next(choices[-1], None) if len(choices) > len(ends) else None
        if end is not None:
            ends.append(end)
            position = end + len(gaps[len(ends) - 1])
            continue
        if len(choices) > len(ends):
            choices.pop()
        if not ends:
            return None
        ends.pop()


def _possible_ends(text: str, position: int, value: str, gap: str) -> Iterator[int]:
    """Yield the ends of a text at a position, in all forms in which a function can print it, before a gap."""
    for form in dict.fromkeys(_printed_forms(str.__str__(value))):
        end = position + len(form)
        if text.startswith(form, position) and text.startswith(gap, end):
            yield end


def _printed_forms(value: str) -> Iterable[str]:
    """Yield the forms of a text: unchanged, without whitespace around it, and inside a JSON string."""
    for form in (value, value.strip(), value.rstrip(), value.lstrip()):
        yield form
        yield json.dumps(form, ensure_ascii=False)[1:-1]
        yield json.dumps(form)[1:-1]
