"""Stop: which of the template's text after an answer ends the turn, and so must be learnt.

A template's own words tell: what it prints after the answer where the conversation ends there is the turn's own;
what it prints before every user message is the next message's; what it prints only where the conversation ends is
neither. Control tokens of the tokenizer only say where, inside the turn's own text, the stop ends.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ftdata.errors import BadRow
from ftdata.templates.attribution.agreement import TAG, common_prefix, find_tags


@dataclass(frozen=True, slots=True)
class TurnStops:
    """How turns end under one template and tokenizer.

    Attributes:
        eos: the tokenizer's end-of-sequence token.
        control: finds the tokenizer's control tokens.
        stop: the text from an answer's end to its stop, where the template prints one inside a conversation.
        opener: what the template prints before a user message.
        before: what it prints before the first message, where it is not certain what of that opens the message.
        leftover: what it prints after the last stop of a conversation, and the model never generates.
        late: whether it prints a turn's stop only before the next message.
        learnt: whether the template could be probed at all.
    """

    eos: str | None
    control: re.Pattern[str] | None
    stop: str = ""
    opener: str = ""
    before: str = ""
    leftover: str = ""
    late: bool = False
    learnt: bool = False

    def own(self, tail: str) -> int:
        """Return where the stop ends in `tail`, which is the template's text at the end of this very turn.

        0 where there is no stop.

        Raises:
            BadRow: `unknown_stop`: text follows the last control token, so what the model ends with is not certain.
        """
        if self.leftover.strip() and tail.rstrip().endswith(self.leftover.rstrip()):
            tail = tail.rstrip().removesuffix(self.leftover.rstrip())
        end = self.known(tail)
        if not end and (end := _last(self.control, tail)) and tail[end:].strip():
            raise BadRow(
                "unknown_stop",
                f"no single stop token ends the turn; the template writes {tail[:80]!r} after the answer",
                hint="mark what is trained with {% generation %} in a template file of your own",
            )
        return end or len(tail.rstrip())

    def between(self, ending: str | None, gap: str) -> int:
        """Return where the stop ends in `gap`, the text between an answer and the next message's text.

        `ending` is what the template prints after this answer where the conversation ends there, if it tells. 0 where
        there is no stop.
        """
        closing = self._closing(gap)
        opened = closing is not None and not self.before
        if end := self.known(gap if closing is None else closing):
            return end
        shared = common_prefix(ending or "", gap)
        # Where the template always asks for the next answer, both may go on with the same opening tag.
        for certain in (closing or "",) if opened else (shared[: len(closing or "")], shared):
            if end := _last(self.control, certain) or _last(TAG, certain):
                return end
        if closing is None or opened:
            return 0
        end = _last(self.control, closing) or _last(TAG, closing)
        opening = {_unnumbered(tag) for tag in find_tags(self.before)}
        return 0 if opening & {_unnumbered(tag) for tag in find_tags(closing[:end])} else end

    def later(self, gap: str) -> int:
        """Return where the stop as learnt ends in `gap`, text that may be the next message's; 0 where there is none."""
        closing = self._closing(gap)
        return self._learnt(gap if closing is None else closing)

    def known(self, tail: str) -> int:
        """Return where the first stop as learnt, or else the first EOS, ends in `tail`; 0 where there is neither."""
        return self._learnt(tail) or self._eos(tail)

    def _closing(self, gap: str) -> str | None:
        """Return the part of `gap` before a user message opens in it; `None` where none does."""
        if not self.opener.strip():
            return gap.removesuffix(self.opener) if self.opener and gap.endswith(self.opener) else None
        before, found, _ = gap.partition(self.opener)
        return before if found else None

    def _eos(self, tail: str) -> int:
        return tail.find(self.eos) + len(self.eos) if self.eos and self.eos in tail else 0

    def _learnt(self, tail: str) -> int:
        stop = self.stop.strip()
        return tail.find(stop) + len(stop) if stop and stop in tail else 0


def _unnumbered(tag: str) -> str:
    return re.sub(r"\d+", "0", tag)


def _last(pattern: re.Pattern[str] | None, text: str) -> int:
    return max((match.end() for match in pattern.finditer(text)), default=0) if pattern is not None else 0
