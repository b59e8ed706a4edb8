"""Compare the tokens and masks of conversations with images on real chat templates.

    python benchmarks/masks/images.py --corpus DIR --tokenizer DIR [--methods ftdata trl] [--workers 2] [--show 20]

The templates of the corpus that print a placeholder for an image are used with the processor to which the placeholder
belongs (`PROCESSORS`). The correct ids are the ids of the rendered text in which each placeholder is replaced as the
processor of transformers replaces it; for Gemma 3, LLaVA and Mllama, this text is a constant. `oracle.py` determines
the correct mask without ftdata. A conversation is exact if the ids and the trained tokens are exact; it is silently
wrong if they are not, and the method raises no error. The last column counts trained image tokens. Conversations whose
correct mask is uncertain, or which the template cannot render, are left out.

`image_peers.py` computes the masks of the other tools.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import transformers
from corpus import CLOCK, Template, from_folder
from image_peers import IMAGE_PEERS
from PIL import Image
from run import load_tokenizer, show_progress, silence

METHODS = ["ftdata", *IMAGE_PEERS]

SIZES = ((640, 480), (37, 91), (300, 64), (1000, 700))
"""Sizes of the images. Image `n` of a conversation has the size `n`."""


class Processor(NamedTuple):
    """An image processor with the text that replaces a placeholder.

    Attributes:
        name: name of the class of the processor.
        settings: content of `preprocessor_config.json`.
        expand: returns the replacement of the placeholder for an image, computed with the classes of transformers.
        feature: the token that is never trained.
    """

    name: str
    settings: dict[str, Any]
    expand: Callable[[Image.Image], str]
    feature: str


def _qwen(image: Image.Image) -> str:
    made = transformers.Qwen2VLImageProcessorPil()(images=[image], return_tensors="np")
    return "<|image_pad|>" * int(made["image_grid_thw"][0].prod() // 4)


def _gemma(_: Image.Image) -> str:
    return "\n\n<start_of_image>" + "<image_soft_token>" * 256 + "<end_of_image>\n\n"


def _pixtral(image: Image.Image) -> str:
    size = {"height": 16, "width": 16}
    made = transformers.PixtralImageProcessorPil(patch_size=size)(images=[image], return_tensors="np")
    rows, columns = (int(side) // 16 for side in made["image_sizes"][0])
    return "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"


def _llava(_: Image.Image) -> str:
    return "<image>" * 576


def _internvl(image: Image.Image) -> str:
    made = transformers.GotOcr2ImageProcessorPil(crop_to_patches=True)(images=[image], return_tensors="np")
    return "<img>" + "<IMG_CONTEXT>" * (256 * int(made["num_patches"][0])) + "</img>"


def _mllama(_: Image.Image) -> str:
    return "<|image|>"


_LLAVA = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
_SIZE = {"crop_size": {"height": 336, "width": 336}, "size": {"shortest_edge": 336}}

PROCESSORS = {
    "<|image_pad|>": Processor("Qwen2VLProcessor", {}, _qwen, "<|image_pad|>"),
    "<start_of_image>": Processor("Gemma3Processor", {"image_seq_length": 256}, _gemma, "<image_soft_token>"),
    "[IMG]": Processor("PixtralProcessor", {"patch_size": 16}, _pixtral, "[IMG]"),
    "<IMG_CONTEXT>": Processor("InternVLProcessor", {}, _internvl, "<IMG_CONTEXT>"),
    "<image>": Processor("LlavaProcessor", {**_LLAVA, **_SIZE}, _llava, "<image>"),
    "<|image|>": Processor("MllamaProcessor", {}, _mllama, "<|image|>"),
}
"""The text that a template prints for an image -> the processor that replaces it."""

_TOKENS = ("<image_soft_token>", "<end_of_image>", "[IMG_BREAK]", "[IMG_END]", "<img>", "</img>", *PROCESSORS)


def _user(*content: Any) -> dict[str, Any]:
    parts = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in content]
    return {"role": "user", "content": parts}


def _answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


CHATS = {
    "no image": [_user("How far is the moon?"), _answer("About 384,400 km.")],
    "image first": [_user(None, "What is this?"), _answer("A red boat.")],
    "image last": [_user("What is this?", None), _answer("A red boat.\n")],
    "image only": [_user(None), _answer("A red boat.")],
    "between texts": [_user("Compare ", None, " with ", None, "."), _answer("The second one is larger.")],
    "in a later turn": [_user("Hi"), _answer("Hello!"), _user(None, "And this?"), _answer("A cat.")],
    "in two turns": [_user(None, "One?"), _answer("A dog."), _user(None, "Two?"), _answer("A cow.")],
    "four images": [_user(None, None, "Which of", None, None, "?"), _answer("The third.")],
    "with a system message": [
        {"role": "system", "content": "Be brief."},
        _user(None, "What is this?"),
        _answer("A boat."),
    ],
}


class Score(NamedTuple):
    """The outcome of a method for a conversation, `exact`, `refused` or `silent`, and the trained image tokens."""

    method: str
    kind: str
    processor: str
    template: str
    outcome: str
    image_tokens: int = 0
    why: str = ""


@lru_cache(maxsize=1)
def _images() -> list[str]:
    folder = Path(tempfile.mkdtemp())
    for number, size in enumerate(SIZES):
        Image.new("RGB", size, (40 * number, 90, 200)).save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(len(SIZES))]


def ours(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Return the ids and the mask of ftdata."""
    import ftdata

    (example,) = ftdata.encode(messages, tokenizer, control_tokens="allow", date=CLOCK)
    return example.input_ids.tolist(), example.trained.tolist()


def score_template(folder: str, specials: tuple[str, ...], methods: Sequence[str], template: Template) -> list[Score]:
    """Score all methods on all conversations of one template."""
    silence()
    tokenizer = load_tokenizer(folder, (*specials, *_TOKENS))
    tokenizer.chat_template = template.source
    tokenizer.bos_token, tokenizer.eos_token = template.bos_token, template.eos_token

    def render(messages: Sequence[dict[str, Any]], generation_prompt: bool) -> str:
        options = {"tokenize": False, "add_generation_prompt": generation_prompt}
        return str(tokenizer.apply_chat_template(list(messages), **options))

    try:
        texts = [render(CHATS[kind], False) for kind in ("no image", "image first")]
    except Exception:  # noqa: BLE001  (a template may raise anything)
        return []
    placeholder = next((one for one in PROCESSORS if texts[1].count(one) == 1 and one not in texts[0]), None)
    if placeholder is None:
        return []
    processor = PROCESSORS[placeholder]
    with tempfile.TemporaryDirectory() as scratch:
        settings = {**processor.settings, "processor_class": processor.name}
        for name in ("preprocessor_config.json", "processor_config.json"):
            (Path(scratch) / name).write_text(json.dumps(settings))
        tokenizer.name_or_path = scratch
        work = partial(_score_chat, tokenizer, template, render, placeholder, methods=methods)
        return [*chain.from_iterable(map(work, CHATS))]


def _score_chat(
    tokenizer: Any, template: Template, render: oracle.Render, placeholder: str, kind: str, *, methods: Sequence[str]
) -> Iterator[Score]:
    processor, messages = PROCESSORS[placeholder], CHATS[kind]
    count = sum(part == {"type": "image"} for one in messages for part in one["content"])
    try:
        text, spans = render(messages, False), oracle.spans_of(messages, template.eos_token, render)
    except Exception:  # noqa: BLE001
        return
    if spans is None or text.count(placeholder) != count:
        return
    ids, trained = _find_truth(tokenizer, text, spans, placeholder)
    feature = tokenizer.convert_tokens_to_ids(processor.feature)
    paths = iter(_images())
    with_images = [
        one
        if isinstance(one["content"], str)
        else {**one, "content": [part if "text" in part else {**part, "image": next(paths)} for part in one["content"]]}
        for one in messages
    ]
    for method in methods:
        try:
            if method == "ftdata":
                made, mask = ours(tokenizer, with_images)
            else:
                made, mask = ids, IMAGE_PEERS[method](tokenizer, placeholder, processor.feature, ids)
        except Exception as error:  # noqa: BLE001  (whatever a method raises, it refuses)
            yield Score(method, kind, processor.name, template.name, "refused", why=str(error)[:300])
            continue
        is_exact = made == ids and mask == trained
        image_tokens = sum(is_trained and id_ == feature for id_, is_trained in zip(made, mask, strict=True))
        yield Score(method, kind, processor.name, template.name, "exact" if is_exact else "silent", image_tokens)


def _find_truth(
    tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], placeholder: str
) -> tuple[list[int], list[bool]]:
    """Return the ids of a text with all replacements, and whether each token is trained."""
    expand = PROCESSORS[placeholder].expand
    pieces = text.split(placeholder)
    texts = [pieces[0]]
    places = [0]
    for piece, path in zip(pieces[1:], _images(), strict=False):
        places.append(sum(map(len, texts)))
        texts += expand(Image.open(path)), piece
    expanded = "".join(texts)
    encoded = tokenizer(expanded, add_special_tokens=False, return_offsets_mapping=True)
    # Characters of the expanded text that the original spans cover. No span contains a placeholder.
    covered = np.zeros(len(expanded), bool)
    original = 0
    position = 0
    for number, piece in enumerate(pieces):
        for start, end in spans:
            first, last = max(start, original), min(end, original + len(piece))
            covered[position + first - original : position + max(first, last) - original] = True
        original += len(piece) + len(placeholder)
        position += len(piece) + (len(texts[2 * number + 1]) if 2 * number + 1 < len(texts) else 0)
    trained = [bool(covered[start:end].any()) for start, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), trained


def table(scores: Sequence[Score], column: Callable[[Score], str]) -> str:
    """Return the scores as a Markdown table, with a row for each method and value of `column`."""
    lines = [
        "| method | conversations | defined | exact | refused | silently wrong | trained image tokens |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for method, value in dict.fromkeys((score.method, column(score)) for score in scores):
        chosen = [score for score in scores if (score.method, column(score)) == (method, value)]
        counts = Counter(score.outcome for score in chosen)
        exact, refused = (f"{counts[name] / len(chosen):.2%}" for name in ("exact", "refused"))
        silent = f"{counts['silent']:,} ({counts['silent'] / len(chosen):.2%})"
        image_tokens = sum(score.image_tokens for score in chosen)
        lines.append(f"| {method} | {value} | {len(chosen):,} | {exact} | {refused} | {silent} | {image_tokens:,} |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of templates")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--limit", type=int, help="only about so many templates, evenly chosen")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--show", type=int, default=20, help="how many wrong conversations of ftdata to name")
    given = parser.parse_args()
    templates = [one for one in from_folder(given.corpus) if "image" in one.source.lower()]
    templates = templates[:: max(1, len(templates) // given.limit)] if given.limit else templates
    specials = sorted(set().union(*(template.specials for template in templates)))
    work = partial(score_template, str(given.tokenizer), tuple(specials), tuple(given.methods))
    with ProcessPoolExecutor(given.workers) as pool:
        results = show_progress(pool.map(work, templates, chunksize=4), len(templates))
        scores = sorted(chain.from_iterable(results), key=lambda score: given.methods.index(score.method))
    ftdata = [score for score in scores if score.method == "ftdata"]
    for score in [score for score in ftdata if score.outcome != "exact"][: given.show]:
        print(f"{score.outcome}: {score.template}: {score.kind} {score.why}", file=sys.stderr)
    refusals = Counter(score.why.split()[0] for score in ftdata if score.outcome == "refused")
    print(f"templates: {len({score.template for score in scores})}", file=sys.stderr)
    print(f"refusals of ftdata: {refusals.most_common()}", file=sys.stderr)
    for column in (lambda _: "all", lambda score: score.processor, lambda score: score.kind):
        print(table(scores, column), end="\n\n")


if __name__ == "__main__":
    main()
