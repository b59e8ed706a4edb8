"""One of each kind of plug-in."""

from pathlib import Path

from ftdata.images.families import ImageFamily
from ftdata.types import Conversation, Reject, Row, Source

TERSE = Path(__file__).parent / "terse.jinja"


def read_dialogue(file):
    """Yield a row for each line `question => answer` of a `.dialogue` file."""
    with file.text() as stream:
        for number, line in enumerate(stream):
            source = Source(file.path, number, number + 1)
            asked, arrow, said = line.decode().rstrip("\n").partition(" => ")
            if arrow:
                yield Row({"asked": asked, "said": said}, source)
            else:
                yield Reject(source, "no_arrow", "", "has no ' => '", "put one between question and answer")


def interview(row):
    """Make a conversation of a row with `asked` and `said`."""
    return Conversation(({"role": "user", "content": row["asked"]}, {"role": "assistant", "content": row["said"]}))


def first_answer(rendered, conversation):
    """Train the first answer of a conversation only."""
    first = next(i for i, message in enumerate(conversation.messages) if message["role"] == "assistant")
    return [span.generated and span.message == first for span in rendered.spans]


def measure(width, height, settings, tokens):
    """Return one token per step of the width of an image."""
    return tokens["image_token"] * (width // settings["step"])


RULER = ImageFamily(("RulerProcessor",), "image_token", measure, {"image_token": "<image>"}, {"step": 10})
