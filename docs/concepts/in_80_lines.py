"""The core of ftdata in 80 lines: attribute characters, carry them to tokens, mask."""

import jinja2
import numpy as np


class Tracked(str):
    """A string that knows the origin of each character: the index of a message, or -1 for the template."""

    origins: tuple[int, ...]

    def __new__(cls, text, origins):
        self = super().__new__(cls, text)
        self.origins = tuple(origins)
        return self

    def __str__(self):
        return self

    def __add__(self, other):
        return concat([self, other])

    def __radd__(self, other):
        return concat([other, self])

    def __getitem__(self, key):
        return Tracked(super().__getitem__(key), self.origins[key])

    def strip(self, chars=None):
        start = len(self) - len(super().lstrip(chars))
        return self[start : start + len(super().strip(chars))]


def concat(pieces):
    """Join plain and tracked strings. Plain strings are template text."""
    pieces = [piece if isinstance(piece, Tracked) else Tracked(str(piece), [-1] * len(str(piece))) for piece in pieces]
    return Tracked("".join(map(str.__str__, pieces)), [origin for piece in pieces for origin in piece.origins])


class Environment(jinja2.Environment):
    """A Jinja environment whose output keeps the origins of characters."""

    concat = staticmethod(concat)


def render(template, messages, **variables):
    """Render messages with tracked contents."""
    tracked = [
        {**message, "content": Tracked(message["content"], [index] * len(message["content"]))}
        for index, message in enumerate(messages)
    ]
    return template.render(messages=tracked, **variables)


def find_end(turn, index, control_tokens):
    """Return the end of an assistant turn: after the stop token that follows the last character of its content."""
    content_end = max(position for position, origin in enumerate(turn.origins) if origin == index) + 1
    ends = [turn.rfind(token) + len(token) for token in control_tokens if token in turn[content_end:]]
    return max(ends, default=content_end)


def encode(messages, template, tokenizer, **variables):
    """Return the token ids and labels of a conversation. Only generated tokens have a label other than -100."""
    text = render(template, messages, **variables)
    control_tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    generated = np.zeros(len(text), bool)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = render(template, messages[:index], add_generation_prompt=True, **variables)
            turn = render(template, messages[: index + 1], **variables)
            if not text.startswith(prompt) or not text.startswith(turn.rstrip()):
                raise ValueError(f"the template rewrites the history before message {index}")
            generated[len(prompt) : find_end(turn, index, control_tokens)] = True
    tokens = tokenizer.encode(str.__str__(text), add_special_tokens=False)
    # Some tokenizers leave whitespace out of the offsets. It belongs to the token that follows the previous one.
    previous_ends = [0, *(end for _, end in tokens.offsets)]
    starts = [min(start, end) for (start, _), end in zip(tokens.offsets, previous_ends, strict=False)]
    trained = [generated[start:end].any() for start, (_, end) in zip(starts, tokens.offsets, strict=True)]
    return tokens.ids, [token if is_trained else -100 for token, is_trained in zip(tokens.ids, trained, strict=True)]
