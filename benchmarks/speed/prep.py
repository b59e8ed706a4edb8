"""What it costs to make tokens and labels of conversations, beside other tools: CPU seconds, memory, and whether equal.

    python benchmarks/speed/prep.py --tokenizer FOLDER [--data chats.jsonl] [--rounds 5]

Every tool gets the same rows, tokenizer and template, in a process of its own, one after the other in every round.
Imports and the loading of tokenizers are not counted (they are shown). `equal` compares all ids and labels with ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPLATE = "chatml"
WORDS = [
    "the",
    "of",
    "model",
    "answer",
    "token",
    "label",
    "42",
    "with",
    "question,",
    "because",
    "(often)",
    "however;",
    "naïve",
    "café",
    "数据",
    "it's\n\nfirst:",
    "-",
    "list",
]

Counted = dict[str, Any]


def main() -> None:
    """Run all tools in turn, and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", help="JSON Lines of messages; default: 1,000 made-up conversations")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(TOOLS[given.child](Path(given.data), given.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(given.data) if given.data else _made_up(Path(scratch) / "chats.jsonl", 1000)
        results: dict[str, list[Counted]] = {tool: [] for tool in given.tools.split(",")}
        for number in range(given.rounds):
            for tool, found in results.items():
                found.append(_child(tool, data, given.tokenizer))
                print(f"round {number + 1}: {tool} {found[-1]['cpu']:.2f} s", file=sys.stderr)
    _table(results)


def _child(tool: str, data: Path, tokenizer: str) -> Counted:
    command = [sys.executable, __file__, "--child", tool, "--data", str(data), "--tokenizer", tokenizer]
    done = subprocess.run(  # noqa: S603  (itself)
        command, check=True, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _table(results: dict[str, list[Counted]]) -> None:
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
            talk = [
                {"role": role, "content": words(chance, 20, 300)}
                for _ in range(chance.randint(1, 6))
                for role in ("user", "assistant")
            ]
            system = [{"role": "system", "content": words(chance, 20, 300)}] if chance.random() < 0.3 else []
            file.write(json.dumps({"messages": [*system, *talk]}, ensure_ascii=False) + "\n")
    return path


def words(chance: random.Random, least: int, most: int) -> str:
    """Return a text of some words."""
    return " ".join(chance.choices(WORDS, k=chance.randint(least, most)))


def _cpu() -> float:
    return sum(
        getattr(resource.getrusage(who), name)
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        for name in ("ru_utime", "ru_stime")
    )


def _counted(load: Callable[[], Any], work: Callable[[Any], Any], rows: Callable[[Any], Any]) -> Counted:
    """Time the work alone, and digest the rows that came of it: pairs of ids and labels."""
    began = _cpu()
    loaded = load()
    ready, clock = _cpu(), time.perf_counter()
    done = work(loaded)
    cpu, wall = _cpu() - ready, time.perf_counter() - clock
    digest, tokens, trained = hashlib.sha256(), 0, 0
    for ids, labels in rows(done):
        digest.update(json.dumps([list(ids), list(labels)]).encode())
        tokens += len(ids)
        trained += sum(label != -100 for label in labels)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"cpu": cpu, "wall": wall, "load": ready - began, "peak": peak}
    return {**figures, "tokens": tokens, "trained": trained, "digest": digest.hexdigest()}


def ftdata(data: Path, tokenizer: str, *, fast: bool = True) -> Counted:
    """A whole build: read, checked, encoded, written to disk with its report and hashes."""
    if not fast:
        sys.modules["fastokens"] = None  # type: ignore[assignment]
    from ftdata.build import write_build
    from ftdata.engines import ENOUGH
    from ftdata.recipe import make_recipe

    def load() -> Any:
        recipe = make_recipe(tokenizer, TEMPLATE)
        recipe.tokenizer.engines.expect(ENOUGH)
        recipe.tokenizer.encode(["x"])
        return recipe.tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        # What is done for the second time is not what is timed here.
        os.environ["FTDATA_CACHE"] = f"{scratch}/cache"

        def rows(_: Any) -> Any:
            import datasets

            built = datasets.load_from_disk(f"{scratch}/built")["train"].with_format("arrow")[:]
            return zip(built["input_ids"].to_pylist(), built["labels"].to_pylist(), strict=True)

        return _counted(load, lambda loaded: write_build(data, loaded, f"{scratch}/built", template=TEMPLATE), rows)


def trl(data: Path, tokenizer: str) -> Counted:
    """SFTTrainer with `assistant_only_loss`, up to the first step."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    from ftdata.templates import find

    datasets.disable_caching()

    def load() -> Any:
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
        loaded.chat_template = find(TEMPLATE)[1]
        config = transformers.LlamaConfig(
            vocab_size=len(loaded), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
        return loaded, transformers.LlamaForCausalLM(config)

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
        return _counted(load, work, rows)


TOOLS: dict[str, Callable[[Path, str], Counted]] = {
    "ftdata": ftdata,
    "ftdata without fastokens": lambda data, tokenizer: ftdata(data, tokenizer, fast=False),
    "trl": trl,
}

if __name__ == "__main__":
    main()
