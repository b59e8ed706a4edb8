"""Measure the CPU time and memory that ftdata and TRL need to prepare conversations with images, and compare them.

    python benchmarks/speed/images.py --tokenizer FOLDER [--rows 400] [--rounds 3] [--json FILE]

FOLDER contains the tokenizer of Gemma 3. The images are JPEG files of 640 x 480 pixels. ftdata builds the data set, for
which it reads the headers and the hashes of the images. TRL's collator tokenizes the rows and preprocesses the images
in each epoch; it is measured for one epoch. `equal` compares the ids.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from counting import Counted, counted, run_tool
from prep import print_table

SIZE = (640, 480)
TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}


def main() -> None:
    """Run both tools in alternating rounds, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(TOOLS[given.child](Path(given.data), given.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = save_processor(given.tokenizer, f"{scratch}/model")
        data = write_rows(Path(scratch), given.rows)
        results: dict[str, list[Counted]] = {tool: [] for tool in TOOLS}
        for number in range(given.rounds):
            for tool, found in results.items():
                found.append(run_tool(__file__, tool, data, model))
                print(f"round {number + 1}: {tool} {found[-1]['cpu']:.2f} s", file=sys.stderr)
    print_table(results)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


def save_processor(tokenizer: str, folder: str) -> str:
    """Save the processor of Gemma 3 with its default settings and TRL's copy of the chat template."""
    import transformers
    import trl

    template = (Path(trl.__file__).parent / "chat_templates" / "gemma3.jinja").read_text("utf-8")
    size = {"height": 896, "width": 896}
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer, extra_special_tokens=TOKENS)
    loaded.chat_template = template
    images = transformers.Gemma3ImageProcessorPil(size=size)
    transformers.Gemma3Processor(images, loaded, chat_template=template).save_pretrained(folder)
    return folder


def write_rows(folder: Path, count: int) -> Path:
    """Write conversations, each with one image of noise."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for number in range(count):
            noise = generator.integers(0, 256, (SIZE[1] // 16, SIZE[0] // 16, 3), np.uint8)
            Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
            question = [{"type": "image"}, {"type": "text", "text": f"What is in image {number}?"}]
            answer = [{"type": "text", "text": f"It shows colored noise, and it is image number {number}. " * 8}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages, "images": [f"{number}.jpg"]}) + "\n")
    return path


def ftdata(data: Path, folder: str) -> Counted:
    """Run a complete build, which writes the data set, the report and the hashes to disk."""
    from ftdata.build.dataset import write_build
    from ftdata.pipeline.recipe import make_recipe

    os.environ["FTDATA_CACHE"] = "off"

    def load() -> Any:
        recipe = make_recipe(folder)
        recipe.tokenizer.encoders.expect_input(sys.maxsize)
        recipe.tokenizer.encode(["x"])
        return recipe.tokenizer

    def work(loaded: Any) -> Any:
        return write_build(data, loaded, f"{scratch}/built")

    def rows(_: Any) -> Iterator[Any]:
        import datasets

        for row in datasets.load_from_disk(f"{scratch}/built")["train"]:
            yield row["input_ids"], []

    with tempfile.TemporaryDirectory() as scratch:
        return counted(load, work, rows)


def trl(data: Path, folder: str) -> Counted:
    """Run TRL's collator for images once over all rows, in batches of eight."""
    import torch
    from PIL import Image
    from transformers import AutoProcessor
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    torch.set_num_threads(1)

    def load() -> Any:
        return DataCollatorForVisionLanguageModeling(AutoProcessor.from_pretrained(folder), max_length=None)

    def work(collator: Any) -> Any:
        batches, batch = [], []
        lines = data.read_text().splitlines()
        for number, line in enumerate(lines):
            row = json.loads(line)
            row["images"] = [Image.open(data.parent / name) for name in row["images"]]
            batch.append(row)
            if len(batch) == 8 or number == len(lines) - 1:
                made = collator(batch)
                batches.append([made["input_ids"], made["attention_mask"]])
                batch = []
        return batches

    def rows(batches: Any) -> Iterator[Any]:
        for ids, mask in batches:
            for row, kept in zip(ids, mask.bool(), strict=True):
                yield row[kept].tolist(), []

    return counted(load, work, rows)


TOOLS: dict[str, Callable[[Path, str], Counted]] = {"ftdata": ftdata, "trl": trl}

if __name__ == "__main__":
    main()
