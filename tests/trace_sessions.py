"""Synthetic agent sessions with the contexts that the model saw, for tests and benchmarks.

A session is a list of operations: prompts, responses with tool calls, branches, compactions, sub-agents, failed requests
and records without content. Every text in it is a marker that occurs nowhere else. `trace_writers` writes sessions as
programs log them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

MARKER = re.compile(r"<<\w+>>")


@dataclass
class Response:
    """A response of the model: markers of its parts. Each call is a pair of the markers of its argument and result."""

    reasoning: str
    text: str
    calls: list[tuple[str, str]]
    result_order: list[int]


@dataclass
class Operation:
    """A step of a session.

    Attributes:
        kind: prompt, response, failure, noise, repeat (a record is written twice), rewind, compact or agent.
        marker: the text of a prompt, failure, noise or summary.
        response: a response.
        depth: number of turns that stay after a rewind.
        session: the session of a sub-agent.
    """

    kind: str
    marker: str = ""
    response: Response | None = None
    depth: int = 0
    session: Session | None = None


@dataclass
class Session:
    """The operations of a session, and the markers of each context in the order in which the model saw them."""

    operations: list[Operation] = field(default_factory=list)
    contexts: list[list[str]] = field(default_factory=list)

    @property
    def model_markers(self) -> set[str]:
        """The markers that the model wrote."""
        return {marker for context in self.contexts for marker in context if marker[2] in "tkc"}


class _Maker:
    """Makes the operations of a session. `path` has the markers of each turn, and `base` the summary before them."""

    def __init__(self, rng: random.Random, numbers: Any, features: Sequence[str]) -> None:
        self.rng, self.numbers, self.features = rng, numbers, features
        self.session = Session()
        self.path: list[list[str]] = []
        self.base: list[str] = []

    def marker(self, letter: str) -> str:
        return f"<<{letter}{next(self.numbers)}>>"

    def add(self, kind: str, marker: str = "", **values: Any) -> None:
        self.session.operations.append(Operation(kind, marker, **values))

    def end_context(self) -> None:
        self.session.contexts.append([*self.base, *(item for turn in self.path for item in turn)])

    def turn(self) -> None:
        turn = [self.marker("u")]
        self.add("prompt", turn[0])
        if "failure" in self.features and self.rng.random() < 0.3:
            self.add("failure", self.marker("e"))
        for number in range(self.rng.randint(1, 3)):
            response = _make_response(self.rng, self.marker, is_last=number == 2)
            self.add("response", response=response)
            turn += [part for part in (response.reasoning, response.text) if part]
            turn += [call for call, _ in response.calls]
            turn += [response.calls[index][1] for index in response.result_order]
            if not response.calls:
                break
        self.path.append(turn)

    def rewind(self) -> None:
        if len(self.path) > 1:
            self.end_context()
            depth = self.rng.randint(1, len(self.path) - 1)
            self.add("rewind", depth=depth)
            del self.path[depth:]

    def compact(self) -> None:
        self.end_context()
        self.base, self.path = [self.marker("s")], []
        self.add("compact", self.base[0])

    def agent(self) -> None:
        child = make_session(self.rng.randrange(1 << 30), 4, (), self.numbers)
        self.add("agent", self.marker("a"), session=child)
        self.session.contexts += child.contexts

    def noise(self) -> None:
        self.add("noise", self.marker("n"))

    def repeat(self) -> None:
        self.add("repeat")

    def failure(self) -> None:
        """Failures follow prompts."""


def make_session(seed: int, size: int = 12, features: Sequence[str] = (), numbers: Any = None) -> Session:
    """Make a random session with the given features: rewind, compact, agent, failure, noise, repeat."""
    maker = _Maker(random.Random(seed), numbers or count(), features)
    operations = maker.session.operations
    while len(operations) < size or operations[-1].kind in ("prompt", "rewind", "compact"):
        choice = maker.rng.choice(["turn", "turn", *features])
        getattr(maker, choice if maker.path else "turn")()
    maker.end_context()
    return maker.session


def _make_response(rng: random.Random, marker: Any, *, is_last: bool) -> Response:
    calls = [(marker("c"), marker("r")) for _ in range(0 if is_last else rng.choice([0, 1, 1, 2, 3]))]
    order = rng.sample(range(len(calls)), len(calls))
    return Response(marker("k") if rng.random() < 0.5 else "", marker("t") if not calls or rng.random() < 0.5 else "",
                    calls, order)  # fmt: skip


@dataclass(frozen=True)
class Differences:
    """How the rows of a tool differ from the contexts of a session, in markers.

    Attributes:
        lost: markers in a context and in no row.
        duplicated: repetitions of a marker in a row, and markers of the model that several rows train.
        reordered: markers in another order than in the context.
        foreign: markers in a row whose context does not contain them.
    """

    lost: int
    duplicated: int
    reordered: int
    foreign: int


def compare_rows(session: Session, rows: Iterable[Sequence[dict[str, Any]]]) -> Differences:
    """Compare the messages of rows with the contexts of a session."""
    sequences = [[*_message_markers(messages)] for messages in rows]
    wanted = {marker for context in session.contexts for marker in context}
    printed = {marker for sequence in sequences for marker, _ in sequence}
    duplicated = sum(len(sequence) - len({marker for marker, _ in sequence}) for sequence in sequences)
    trained = [marker for sequence in sequences for marker in {m for m, is_trained in sequence if is_trained}]
    duplicated += len(trained) - len(set(trained))
    reordered = foreign = 0
    for sequence in sequences:
        markers = list(dict.fromkeys(marker for marker, _ in sequence))
        context = max(session.contexts, key=lambda context: len({*context} & {*markers}) - len({*context} ^ {*markers}))
        positions = {marker: number for number, marker in enumerate(context)}
        foreign += sum(marker not in positions for marker in markers)
        order = [positions[marker] for marker in markers if marker in positions]
        reordered += len(order) - _longest_increasing(order)
    return Differences(len(wanted - printed), duplicated, reordered, foreign)


def _message_markers(messages: Sequence[dict[str, Any]]) -> Iterable[tuple[str, bool]]:
    for message in messages:
        trained = message["role"] == "assistant" and message.get("train", True)
        calls = [call["function"]["arguments"] for call in message.get("tool_calls") or ()]
        for value in (message.get("reasoning_content"), message.get("content"), *calls):
            for marker in MARKER.findall(json.dumps(value)):
                yield marker, bool(trained)


def _longest_increasing(numbers: Sequence[int]) -> int:
    from bisect import bisect_left

    ends = list[int]()
    for number in numbers:
        position = bisect_left(ends, number)
        ends[position : position + 1] = [number]
    return len(ends)
