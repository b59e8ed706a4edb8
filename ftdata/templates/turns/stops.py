"""Find the end of a turn's stop token in the template text after an answer. The stop token is trained.

Only text that the template prints is considered. The text that it prints after an answer at the end of a conversation
belongs to the turn. The text that it prints before every user message belongs to the next message. The text that it
prints only at the end of a conversation belongs to neither. The tokenizer's control tokens are used only to find where
the stop ends within the text of the turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ftdata.errors import BadRow
from ftdata.templates.attribution.agreement import TAG, common_prefix, find_tags


@dataclass(frozen=True, slots=True)
class TurnStops:
    """The texts that a template prints at the end of a turn, such as the stop token of a tokenizer.

    Attributes:
        eos: the tokenizer's end-of-sequence token.
        control: pattern that matches the tokenizer's control tokens.
        stop: text from the end of an answer to the end of its stop token, if the template prints a stop token between
            messages.
        opener: text that the template prints before a user message.
        first_opener: text before the first message, if it is uncertain which part of it opens the message.
        footer: text after the last stop token of a conversation, which the model never generates.
        is_late: whether the template prints the stop token of a turn only before the next message.
        is_probed: whether the template could be probed.
    """

    eos: str | None
    control: re.Pattern[str] | None
    stop: str = ""
    opener: str = ""
    first_opener: str = ""
    footer: str = ""
    is_late: bool = False
    is_probed: bool = False

    def find_end(self, tail: str) -> int:
        """Find the end of the stop token in the template text `tail`, which follows the last answer.

        Returns:
            The number of characters up to the end of the stop token, or 0 without a stop token.

        Raises:
            BadRow: `unknown_stop`, if text follows the last control token, so that the stop token is uncertain.
        """
        if self.footer.strip() and tail.rstrip().endswith(self.footer.rstrip()):
            tail = tail.rstrip().removesuffix(self.footer.rstrip())
        end = self.find_known_end(tail)
        if not end and (end := _find_last_end(self.control, tail)) and tail[end:].strip():
            message = f"the stop token of the turn is uncertain: the template prints {tail[:80]!r} after the answer"
            hint = "mark the generated text with {% generation %} in a copy of the template"
            raise BadRow("unknown_stop", message, hint=hint)
        return end or len(tail.rstrip())

    def find_end_between(self, ending: str | None, gap: str) -> int:
        """Find the end of the stop token in the template text `gap`, between an answer and the next message.

        Args:
            ending: text after this answer if the conversation ends there, or `None` if the text is unknown.
            gap: text between the answer and the text of the next message.

        Returns:
            The number of characters up to the end of the stop token, or 0 without a stop token.
        """
        closing = self._before_opener(gap)
        if end := self.find_known_end(gap if closing is None else closing):
            return end
        if closing is not None and not self.first_opener:
            return self._find_last_mark(closing)
        shared = common_prefix(ending or "", gap)
        # If the template always adds a generation prompt, both texts may continue with the same opening tag.
        if end := self._find_last_mark(shared[: len(closing or "")]) or self._find_last_mark(shared):
            return end
        if closing is None:
            return 0
        # The last tag may belong to the next message if the first message begins with the same tag.
        end = self._find_last_mark(closing)
        opening_tags = {_replace_digits(tag) for tag in find_tags(self.first_opener)}
        return 0 if opening_tags & {_replace_digits(tag) for tag in find_tags(closing[:end])} else end

    def find_late_end(self, gap: str) -> int:
        """Find the end of the detected stop token in `gap`. The template may print this token with the next message.

        Return 0 if `gap` does not contain the stop token.
        """
        closing = self._before_opener(gap)
        return self._find_probed_end(gap if closing is None else closing)

    def find_known_end(self, tail: str) -> int:
        """Find the end of the detected stop token in `tail`, or of EOS. Return 0 if neither token occurs."""
        return self._find_probed_end(tail) or self._find_eos_end(tail)

    def _before_opener(self, gap: str) -> str | None:
        """Return the text before the header of the next user message, or `None` if `gap` contains no such header."""
        if not self.opener.strip():
            return gap.removesuffix(self.opener) if self.opener and gap.endswith(self.opener) else None
        before, opener, _ = gap.partition(self.opener)
        return before if opener else None

    def _find_last_mark(self, text: str) -> int:
        """Find the end of the last control token, or else of the last tag. Return 0 if `text` contains neither."""
        return _find_last_end(self.control, text) or _find_last_end(TAG, text)

    def _find_eos_end(self, tail: str) -> int:
        return tail.find(self.eos) + len(self.eos) if self.eos and self.eos in tail else 0

    def _find_probed_end(self, tail: str) -> int:
        stop = self.stop.strip()
        return tail.find(stop) + len(stop) if stop and stop in tail else 0


def _replace_digits(tag: str) -> str:
    return re.sub(r"\d+", "0", tag)


def _find_last_end(pattern: re.Pattern[str] | None, text: str) -> int:
    return max((match.end() for match in pattern.finditer(text)), default=0) if pattern is not None else 0
