"""Measure the CPU time and memory that tools need to make tokens and labels, and compare the results.

    python benchmarks/speed/prep.py --tokenizer FOLDER [--data chats.jsonl] [--rounds 5] [--peers DIR] [--json FILE]

Every tool receives the same rows, and the same tokenizer and template if possible. Each tool runs in a separate
process, and the tools take turns in every round. Imports and the loading of the tokenizer are shown separately. No
tool reuses results of an earlier run. `equal` compares all ids and labels with ftdata. `peers.py` installs the other
tools in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from counting import TEMPLATE, Counted, counted, run_tool, tiny_model
from peers import PEERS

WORDS = [
    "the", "of", "model", "answer", "token", "label", "42", "with", "question,", "because", "(often)", "however;", "-",
    "list", "it's\n\nfirst:",
]  # fmt: skip
OTHERS = ["naïve", "café", "数据", "“so”"]


def main() -> None:
    """Run the tools in alternating rounds, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", help="JSON Lines of messages; default: 1,000 made-up conversations")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tools", help="some of these, by commas")
    parser.add_argument("--peers", type=Path, default=Path("nowhere"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(TOOLS[given.child](Path(given.data), given.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(given.data) if given.data else _made_up(Path(scratch) / "chats.jsonl", 1000)
        here = [tool for tool in TOOLS if tool not in PEERS or (given.peers / tool).is_dir()]
        results: dict[str, list[Counted]] = {tool: [] for tool in (given.tools.split(",") if given.tools else here)}
        for number in range(given.rounds):
            for tool, found in results.items():
                found.append(
                    run_tool(__file__, tool, data, given.tokenizer, PYTHONPATH=str((given.peers / tool).resolve()))
                )
                print(f"round {number + 1}: {tool} {found[-1]['cpu']:.2f} s", file=sys.stderr)
    print_table(results)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


def print_table(results: dict[str, list[Counted]]) -> None:
    """Print the medians of each tool, and the ratios to ftdata."""
    ours = statistics.median(one["cpu"] for one in results["ftdata"])
    print("| tool | CPU s (min to max) | times ours | tokens | trained | equal | load s | peak MB |")
    print("|---|---:|---:|---:|---:|---|---:|---:|")
    for tool, found in results.items():
        cpu = sorted(one["cpu"] for one in found)
        equal = "yes" if {one["digest"] for one in found} == {results["ftdata"][0]["digest"]} else "no"
        middle = statistics.median(cpu)
        print(
            f"| {tool} | {middle:.2f} ({cpu[0]:.2f} to {cpu[-1]:.2f}) | {middle / ours:.1f} | {found[0]['tokens']:,} | "
            f"{found[0]['trained']:,} | {equal} | {statistics.median(one['load'] for one in found):.1f} | "
            f"{max(one['peak'] for one in found):,.0f} |"
        )


def _made_up(path: Path, count: int) -> Path:
    chance = random.Random(0)  # noqa: S311
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            known = vocabulary(chance)
            talk = [
                {"role": role, "content": words(chance, known, 20, 300)}
                for _ in range(chance.randint(1, 6))
                for role in ("user", "assistant")
            ]
            system = [{"role": "system", "content": words(chance, known, 20, 300)}] if chance.random() < 0.3 else []
            file.write(json.dumps({"messages": [*system, *talk]}, ensure_ascii=False) + "\n")
    return path


def vocabulary(chance: random.Random) -> list[str]:
    """Return the words of a conversation. As in real chats, 40 % of the conversations contain non-ASCII characters."""
    return [*WORDS, *OTHERS] if chance.random() < 0.4 else WORDS


def words(chance: random.Random, known: list[str], least: int, most: int) -> str:
    """Return a random text of the given words."""
    return " ".join(chance.choices(known, k=chance.randint(least, most)))


def ftdata(data: Path, tokenizer: str, *, fast: bool = True, again: bool = False) -> Counted:
    """Run a complete build, which writes the data set, the report and the hashes to disk."""
    if not fast:
        sys.modules["fastokens"] = None  # type: ignore[assignment]
    from ftdata.build.dataset import write_build
    from ftdata.pipeline.recipe import make_recipe

    def load() -> Any:
        recipe = make_recipe(tokenizer, TEMPLATE)
        recipe.tokenizer.encoders.expect_input(sys.maxsize)
        recipe.tokenizer.encode(["x"])
        if again:
            write_build(data, recipe.tokenizer, f"{scratch}/before", template=TEMPLATE, train_on="last_assistant")
        return recipe.tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        os.environ["FTDATA_CACHE"] = f"{scratch}/cache" if again else "off"

        def rows(_: Any) -> Any:
            import datasets

            built = datasets.load_from_disk(f"{scratch}/built")["train"].with_format("arrow")[:]
            return zip(built["input_ids"].to_pylist(), built["labels"].to_pylist(), strict=True)

        return counted(load, lambda loaded: write_build(data, loaded, f"{scratch}/built", template=TEMPLATE), rows)


def trl(data: Path, tokenizer: str) -> Counted:
    """Run `SFTTrainer` with `assistant_only_loss`, up to the first step."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    from ftdata.templates import find_template

    datasets.disable_caching()

    def load() -> Any:
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
        loaded.chat_template = find_template(TEMPLATE)[1]
        return loaded, tiny_model(len(loaded))

    def work(loaded: Any) -> Any:
        rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=f"{scratch}/cache")
        settings = SFTConfig(
            output_dir=f"{scratch}/run",
            assistant_only_loss=True,
            max_length=None,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        return SFTTrainer(model=loaded[1], args=settings, train_dataset=rows, processing_class=loaded[0])

    def rows(trainer: Any) -> Any:
        for row in trainer.train_dataset:
            mask = row.get("assistant_masks")
            yield (
                row["input_ids"],
                row["labels"]
                if mask is None
                else [i if m else -100 for i, m in zip(row["input_ids"], mask, strict=True)],
            )

    with tempfile.TemporaryDirectory() as scratch:
        return counted(load, work, rows)


TOOLS: dict[str, Callable[[Path, str], Counted]] = {
    "ftdata": ftdata,
    "ftdata without fastokens": lambda data, tokenizer: ftdata(data, tokenizer, fast=False),
    "ftdata masked anew": lambda data, tokenizer: ftdata(data, tokenizer, again=True),
    "trl": trl,
    **{name: peer for name, (peer, _) in PEERS.items()},
}

if __name__ == "__main__":
    main()
