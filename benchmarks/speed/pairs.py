"""Measure the CPU time and memory that ftdata and TRL need to prepare preference pairs, and compare the results.

    python benchmarks/speed/pairs.py --tokenizer FOLDER --data chats.jsonl [--pairs 10000] [--rounds 3] [--json FILE]

The prompt of a pair is a conversation without its last answer. The chosen answer is the last answer, and the rejected
answer is the last answer of another conversation. No text follows the stop tokens of the template, so TRL trains the
same tokens as ftdata. `equal` compares the ids and labels of both sides.
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

from counting import Counted, counted, run_tool, tiny_model
from prep import print_table

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    """Run both tools in alternating rounds, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True, help="JSON Lines of messages")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(TOOLS[given.child](Path(given.data), given.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        pairs = write_pairs(Path(given.data), Path(scratch) / "pairs.jsonl", given.pairs)
        results: dict[str, list[Counted]] = {tool: [] for tool in TOOLS}
        for number in range(given.rounds):
            for tool, found in results.items():
                found.append(run_tool(__file__, tool, pairs, given.tokenizer))
                print(f"round {number + 1}: {tool} {found[-1]['cpu']:.2f} s", file=sys.stderr)
    print_table(results)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


def write_pairs(data: Path, path: Path, count: int) -> Path:
    """Write preference pairs that are made from conversations."""
    talks = [json.loads(line)["messages"] for line in data.read_text("utf-8").splitlines()]
    talks = [talk for talk in talks if talk[-1]["role"] == "assistant"]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            talk = talks[number % len(talks)]
            other = talks[(number * 7 + 1 + number // len(talks)) % len(talks)]
            if other[-1] == talk[-1]:
                other = talks[(talks.index(other) + 1) % len(talks)]
            row = {"prompt": talk[:-1], "chosen": talk[-1:], "rejected": other[-1:]}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def ftdata(data: Path, tokenizer: str) -> Counted:
    """Run a complete build, which writes the data set, the report and the hashes to disk."""
    from ftdata.build.dataset import write_build
    from ftdata.pipeline.recipe import make_recipe

    os.environ["FTDATA_CACHE"] = "off"

    def load() -> Any:
        recipe = make_recipe(tokenizer, TEMPLATE)
        recipe.tokenizer.encoders.expect_input(sys.maxsize)
        recipe.tokenizer.encode(["x"])
        return recipe.tokenizer

    def work(loaded: Any) -> Any:
        return write_build(data, loaded, f"{scratch}/built", template=TEMPLATE, task="preference", turns="joint")

    def rows(_: Any) -> Iterator[Any]:
        import datasets

        for row in datasets.load_from_disk(f"{scratch}/built")["train"]:
            for side in ("chosen", "rejected"):
                prompt = row["prompt_ids"]
                yield prompt + row[f"{side}_ids"], [-100] * len(prompt) + row[f"{side}_labels"]

    with tempfile.TemporaryDirectory() as scratch:
        return counted(load, work, rows)


def trl(data: Path, tokenizer: str) -> Counted:
    """Run `DPOTrainer` up to the first step."""
    import datasets
    import transformers
    from trl import DPOConfig, DPOTrainer

    datasets.disable_caching()

    def load() -> Any:
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
        loaded.chat_template = TEMPLATE
        return loaded, tiny_model(len(loaded))

    def work(loaded: Any) -> Any:
        rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=f"{scratch}/cache")
        settings = DPOConfig(output_dir=f"{scratch}/run", max_length=None, report_to="none", use_cpu=True, bf16=False)
        model, reference = loaded[1], tiny_model(len(loaded[0]))
        return DPOTrainer(model, reference, settings, train_dataset=rows, processing_class=loaded[0])

    def rows(trainer: Any) -> Iterator[Any]:
        for row in trainer.train_dataset:
            for side in ("chosen", "rejected"):
                prompt = row["prompt_ids"]
                yield prompt + row[f"{side}_ids"], [-100] * len(prompt) + row[f"{side}_ids"]

    with tempfile.TemporaryDirectory() as scratch:
        return counted(load, work, rows)


TOOLS: dict[str, Callable[[Path, str], Counted]] = {"ftdata": ftdata, "trl": trl}

if __name__ == "__main__":
    main()
