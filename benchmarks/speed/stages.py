"""Compare the CPU time of each stage of a build with the time that the underlying library needs for the same rows.

    python benchmarks/speed/stages.py --tokenizer FOLDER --data chats.jsonl [--template chatml] [--rounds 5]

The output shows CPU microseconds per row, as the median of the rounds. The first round is not counted, because caches
are still empty. The difference between a stage and its limit is the cost of the checks: duplicate keys, roles,
operations of the template, text of control tokens, and positions of tokens.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import orjson

from ftdata import types
from ftdata.build.shard_files import write_shard
from ftdata.pipeline import examples, read_rows, render_rows
from ftdata.pipeline.mask import trained_tokens
from ftdata.pipeline.recipe import make_recipe
from ftdata.readers import resolve_sources
from ftdata.schemas import normalize
from ftdata.templates import find_template, render_in_worker
from ftdata.tokenizing.batches import RenderedBatch
from ftdata.tokenizing.tokenizer import encode_rendered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    found: dict[str, list[float]] = {}
    for number in range(given.rounds + 1):
        for name, micros in measured(Path(given.data), given.tokenizer, given.template).items():
            if number:
                found.setdefault(name, []).append(micros)
    times = {name: statistics.median(each) for name, each in found.items()}
    print("| stage | µs a row | limit | is | times |")
    print("|---|---:|---:|---|---:|")
    for stage, limit in LIMITS.items():
        print(f"| {stage} | {times[stage]:.1f} | {times[limit]:.1f} | {limit} | {times[stage] / times[limit]:.1f} |")
    print(f"| the others | {sum(times[name] for name in OTHERS):.1f} | | {', '.join(OTHERS)} | |")


LIMITS = {
    "read": "orjson alone",
    "render": "Jinja2 alone",
    "tokenise": "the engine alone",
    "mask": "one pass over the tokens",
    "write": "the bytes alone",
}
OTHERS = ("normalise", "check", "finish")


def measured(data: Path, tokenizer: str, template: str) -> dict[str, float]:
    recipe = make_recipe(tokenizer, template)
    recipe.tokenizer.encoders.expect_input(1 << 30)
    times: dict[str, float] = {}
    count = sum(1 for _ in data.open("rb"))

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        done = work()
        times[name] = (time.process_time() - began) / count * 1e6
        return done

    (source,) = resolve_sources(str(data))
    lines = data.read_bytes().splitlines()
    timed("orjson alone", lambda: [orjson.loads(line) for line in lines])
    rows = timed("read", lambda: list(source.rows()))
    talks = timed("normalise", lambda: [normalize(row) for row in rows])
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701
    plain = find_template(template)[1].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    compiled = environment.from_string(plain)
    timed("Jinja2 alone", lambda: [compiled.render(messages=talk.messages) for talk in talks])
    texts = timed("render", lambda: [render_in_worker(talk, recipe.template) for talk in talks])
    timed(
        "check",
        lambda: [
            (read_rows.check_answers(talk), render_rows._check_control_tokens(recipe, talk, own))
            for talk, own in zip(talks, texts, strict=True)
        ],
    )
    stream = chain.from_iterable(texts)
    groups = list(iter(lambda: list(islice(stream, 256)), []))
    engine = recipe.tokenizer.encoders
    engine.encode(["x"])
    alone = engine._fast.native.encode_batch_flat if engine._fast else engine.reference.encode
    timed("the engine alone", lambda: [alone([one.text for one in group]) for group in groups])
    encoded = timed(
        "tokenise",
        lambda: [
            encode_rendered(recipe.tokenizer, RenderedBatch(group), recipe.control, "escape")[0] for group in groups
        ],
    )
    chosen = [[recipe.policy(one, talks[0]) for one in group] for group in groups]
    timed("one pass over the tokens", lambda: [np.cumsum(tokens.ids) for tokens in encoded])
    timed(
        "mask",
        lambda: [
            trained_tokens(tokens, RenderedBatch(group), own)
            for tokens, group, own in zip(encoded, groups, chosen, strict=True)
        ],
    )
    owners = zip(rows, talks, strict=True)
    batches = [
        [
            (row, types.RenderedRow(talk, (one,), (own,), is_single_text=True))
            for one, own, (row, talk) in zip(group, trained, owners, strict=False)
        ]
        for group, trained in zip(groups, chosen, strict=True)
    ]
    made = [examples._mask_rows(recipe, [each for _, each in batch]) for batch in batches]
    finished = timed(
        "finish",
        lambda: [examples._finish_rows(recipe, batch, *masked) for batch, masked in zip(batches, made, strict=True)],
    )
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "shard").mkdir()
        timed("write", lambda: write_shard(Path(scratch) / "shard", finished))
        content = b"".join(path.read_bytes() for path in (Path(scratch) / "shard").iterdir())
        timed("the bytes alone", lambda: (Path(scratch) / "bytes").write_bytes(content))
    return times


if __name__ == "__main__":
    main()
