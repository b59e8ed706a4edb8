"""Draw the pictures of `docs/concepts/`: what ftdata makes of small conversations, as it makes it.

python docs/scripts/concepts.py [FOLDER]      needs the extra `test`, for its tokenizer
"""

import sys
import tempfile
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from tokenizer_makers import CHATML, qwen  # noqa: E402

from ftdata import encode, preview  # noqa: E402
from ftdata.build.pack import best_fit_decreasing  # noqa: E402
from ftdata.types import Part  # noqa: E402

TALK = (
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3?"},
    {"role": "assistant", "content": "7"},
)
SHORT = "<{{ m.role[0] }}>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
THOUGHTS = ("Two twos.", "Four and three.")
LENGTHS = (410, 330, 290, 260, 190, 170, 150, 120, 80, 40)
LIMIT = 512
STYLE = """<style>
text { font: 12px ui-monospace, monospace; fill: #1f2328 }
.says { font: 13px sans-serif; fill: #59636e }
.template { fill: #eaeef2 } .data { fill: #ddf4ff } .none { fill: #f6f8fa }
.trained { fill: #aceebb } .stop { fill: #4ac26b }
rect { stroke: #fff; stroke-width: 1.5; rx: 3 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .says { fill: #9198a1 }
.template { fill: #2a313c } .data { fill: #0c2d6b } .none { fill: #151b23 }
.trained { fill: #0f5323 } .stop { fill: #238636 }
rect { stroke: #0d1117 } }
</style>"""
CHAR, ROW = 7.3, 26


def drawing(width, height, parts):
    """Return a picture of these parts."""
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{STYLE}\n' + "\n".join(parts) + "\n</svg>\n"


def box(x, y, width, text, kind):
    """Return a box with a text in its middle, where there is room for it."""
    rect = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 3}" class="{kind}"/>'
    if not text or len(text) * CHAR > width:
        return rect
    place = f'x="{x + width / 2:.1f}" y="{y + 17}" text-anchor="middle" xml:space="preserve"'
    return f"{rect}<text {place}>{escape(text)}</text>"


def strip(y, boxes, x=90):
    """Return boxes side by side, of (width, text, kind), and where the last one ends."""
    ends = [*accumulate((width for width, _, _ in boxes), initial=x)]
    return [box(start, y, *one) for start, one in zip(ends, boxes, strict=False)], ends[-1]


def says(x, y, text):
    """Return a text of the picture's own."""
    return f'<text class="says" x="{x}" y="{y + 17}">{escape(text)}</text>'


def shown(text):
    """Return a text with what it does not show."""
    return text.replace("\n", "↵").replace(" ", "·")


def kind(span, trained):
    """Return how a stretch of text is drawn."""
    if trained:
        return "stop" if span.part is Part.SCAFFOLD else "trained"
    return "template" if span.part is Part.SCAFFOLD else "data"


def stretches(example):
    """Return the spans of an example that hold text, each with whether it is trained."""
    owner = [next(span for span in example.spans if span.start <= start < span.end) for start, _ in example.offsets]
    on = {span for span, yes in zip(owner, example.trained, strict=True) if yes}
    return [(span, span in on) for span in example.spans if span.end > span.start]


def tokens_picture(tokenizer):
    """Draw a text, who wrote it, its tokens and their labels."""
    (example,) = encode(TALK[:2], tokenizer=tokenizer, template=CHATML)
    texts = [shown(example.text[start:end]) for start, end in example.offsets]
    ids, labels = map(str, example.input_ids), map(str, example.labels)
    columns = list(zip(texts, ids, labels, strict=True))
    widths = [max(map(len, column)) * CHAR + 12 for column in columns]
    begins = example.offsets[:, 0]
    edges = {**dict(zip(begins, accumulate(widths, initial=0), strict=False)), len(example.text): sum(widths)}
    spans = [
        (edges[span.end] - edges[span.start], written_by(span, on), kind(span, on)) for span, on in stretches(example)
    ]
    kinds = [kind(span, on) for start in begins for span, on in stretches(example) if span.start <= start < span.end]
    rows = {"written by": spans}
    for name, values in zip(("tokens", "input_ids", "labels"), zip(*columns, strict=True), strict=True):
        of = (
            kinds
            if name != "labels"
            else [one if label != "-100" else "none" for one, label in zip(kinds, values, strict=True)]
        )
        rows[name] = list(zip(widths, values, of, strict=True))
    parts = []
    for number, (name, boxes) in enumerate(rows.items()):
        made, end = strip(8 + number * ROW, boxes)
        parts += [says(4, 8 + number * ROW, name), *made]
    return drawing(end + 8, 8 + len(rows) * ROW, parts)


def written_by(span, trained):
    """Return who wrote a stretch of text."""
    if span.part is Part.SCAFFOLD:
        return "stop" if trained else "template"
    return TALK[span.message]["role"]


def line(example, y):
    """Return the text of an example on one line, its spans in their colours, and where it ends."""
    boxes = [
        (
            len(shown(example.text[span.start : span.end])) * CHAR + 4,
            shown(example.text[span.start : span.end]),
            kind(span, yes),
        )
        for span, yes in stretches(example)
    ]
    return strip(y, boxes, x=130)


def masks_picture(tokenizer):
    """Draw the same conversation under each policy."""
    parts, width = [], 0
    for number, policy in enumerate(("assistant", "last_assistant", "completion", "all")):
        talk = [{**one, "content": one["content"][:8]} for one in TALK]
        (example,) = encode(
            talk,
            tokenizer=tokenizer,
            template=f"{{% for m in messages %}}{SHORT}",
            train_on=policy,
        )
        made, width = line(example, 8 + number * ROW)
        parts += [says(4, 8 + number * ROW, policy), *made]
    return drawing(width + 8, 8 + 4 * ROW, parts)


def turns_picture(tokenizer):
    """Draw a conversation whose template takes thinking out of earlier turns: an example for each turn."""
    talk = [dict(one) for one in TALK]
    for one, thought in zip(talk[1::2], THOUGHTS, strict=True):
        one["reasoning_content"] = thought
    think = "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    source = "{% for m in messages %}" + SHORT.replace("{{ m.content }}", think + "{{ m.content }}")
    parts, widest = [], 0
    for number, example in enumerate(encode(talk, tokenizer=tokenizer, template=source)):
        made, width = line(example, 8 + number * ROW)
        parts += [says(4, 8 + number * ROW, f"example {number + 1}"), *made]
        widest = max(widest, width)
    return drawing(widest + 8, 8 + 2 * ROW, parts)


def preferences_picture(tokenizer):
    """Draw both sides of a pair: the prompt once, then the answers with what is trained in each."""
    chosen = [TALK[1], {"role": "user", "content": "4?"}, {"role": "assistant", "content": "Yes."}]
    rejected = [{"role": "assistant", "content": "It is 22."}]
    row = {"prompt": [TALK[0]], "chosen": chosen, "rejected": rejected}
    source = f"{{% for m in messages %}}{SHORT}"
    (view,) = preview([row], tokenizer, source, task="preference").rows
    prompt = len(f"<u>{TALK[0]['content']}<|im_end|><a>")
    parts, widest = [], 0
    for number, (name, example) in enumerate(zip(("chosen", "rejected"), view.examples, strict=True)):
        boxes = [(len(text) * CHAR + 4, shown(text), one) for text, one in segments(example, prompt if number else 0)]
        x = 130 if number == 0 else 130 + prompt_width(view.examples[0], prompt)
        made, end = strip(8 + number * ROW, boxes, x=x)
        parts += [says(4, 8 + number * ROW, name), *made]
        widest = max(widest, end)
    return drawing(widest + 8, 8 + 2 * ROW, parts)


def segments(example, start):
    """Yield the pieces of a side from a character on, each with how it is drawn."""
    position = 0
    for piece in example.segments():
        position += len(piece.text)
        if position <= start:
            continue
        kinds = ("stop" if piece.stop else "trained") if piece.trained else ("data" if piece.data else "template")
        yield piece.text, kinds


def prompt_width(example, prompt):
    """Return the width of the pieces of a side before a character."""
    position = width = 0
    for piece in example.segments():
        if position >= prompt:
            break
        position += len(piece.text)
        width += len(piece.text) * CHAR + 4
    return width


def packs_picture():
    """Draw examples in the packs that best fit makes of them, and who may look at whom in the first pack."""
    packs = best_fit_decreasing(LENGTHS, LIMIT).packs
    parts = [says(4, 8, f"{len(LENGTHS)} examples of {sum(LENGTHS):,} tokens in {len(packs)} packs of {LIMIT}")]
    for number, pack in enumerate(packs):
        y = 8 + (number + 1) * ROW
        boxes = [(LENGTHS[one], str(LENGTHS[one]), "trained") for one in pack]
        made, end = strip(y, boxes, x=90)
        parts += [
            says(4, y, f"pack {number}"),
            *made,
            box(end, y, 90 + LIMIT - end, "", "none") if end < 90 + LIMIT else "",
        ]
    left, size = 90 + LIMIT + 60, 130
    several = max(packs, key=len)
    edges = [*accumulate((LENGTHS[one] for one in several), initial=0)]
    scale = size / edges[-1]
    parts += [says(left - 30, 8, f"attention in pack {packs.index(several)}")]
    parts += [f'<rect x="{left}" y="{8 + ROW}" width="{size}" height="{size}" class="none"/>']
    for start, end in pairwise(edges):
        a, b, top = left + start * scale, left + end * scale, 8 + ROW
        points = f"{a:.1f},{top + start * scale:.1f} {a:.1f},{top + end * scale:.1f} {b:.1f},{top + end * scale:.1f}"
        parts.append(f'<polygon points="{points}" class="trained"/>')
    return drawing(left + size + 20, max(8 + (len(packs) + 1) * ROW, 8 + ROW + size + 8), parts)


def main(out):
    """Draw all of them."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = qwen(Path(scratch) / "MODEL")
        (out / "tokens.svg").write_text(tokens_picture(tokenizer))
        (out / "masks.svg").write_text(masks_picture(tokenizer))
        (out / "turns.svg").write_text(turns_picture(tokenizer))
        (out / "preferences.svg").write_text(preferences_picture(tokenizer))
    (out / "packs.svg").write_text(packs_picture())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "concepts")
