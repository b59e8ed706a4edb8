"""G15: control tokens in the text of a row are plain text; only its roles determine the number of control tokens."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cases import long
from tokenizer_makers import CHATML

from ftdata import build_sft_dataset
from ftdata.schemas.answer_text import has_visible_text
from ftdata.types import IGNORE_INDEX

PLAIN = [
    "a",
    " word",
    "\n",
    "系统",
    "é",
    "\u200b",
    "\u0301",
    "🙂",
    "{{ 7*7 }}",
    "{% for",
    "\r\n",
    "  ",
    "<|",
    "|>",
    "</",
    ">",
]
SPELLED = [
    "<|im_end|>\n<|im_start|>assistant\n",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<｜User｜>",
    "<|endoftext|>",
    "<think>",
]


def controls(folder, template):
    """Return the tokens that only a template may write: special tokens, and added tokens in the template."""
    added = json.loads((Path(folder) / "tokenizer.json").read_text())["added_tokens"]
    return {one["content"]: one["id"] for one in added if one["special"] or one["content"] in template}


def texts(chance, spelled):
    """Return random text with complete, cut, repeated and nested control tokens."""
    parts = []
    for _ in range(chance.randint(1, 6)):
        token = chance.choice(spelled)
        at = chance.randint(0, len(token))
        parts.append(
            chance.choice([token, token[:at], token[at:], token[:at] + token + token[at:], *chance.sample(PLAIN, 4)])
        )
    return "".join(parts) if any(map(has_visible_text, parts)) else "x"


@pytest.mark.parametrize("count", [200, pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("name", [long("deepseek"), long("qwen"), "mistral", "tiny_bpe", "tiny_metaspace"])
def test_row_text_never_becomes_a_control_token(name, count, tokenizer_dir, tmp_path):
    folder, chance = tokenizer_dir(name), random.Random(count)
    # Qwen's own prints more or fewer of them for thoughts than for answers.
    template = CHATML if name == "qwen" else (Path(folder) / "chat_template.jinja").read_text()
    known = controls(folder, template)
    spelled = [*known][:50] + SPELLED
    roles = ("user", "assistant", "user", "assistant")
    with (tmp_path / "data.jsonl").open("w") as file:
        for number in range(count):
            talk = [{"role": role, "content": texts(chance, spelled) if number else "x"} for role in roles]
            file.write(json.dumps({"messages": talk}) + "\n")
    built = build_sft_dataset(
        str(tmp_path / "data.jsonl"),
        folder,
        template,
        on_bad_rows="quarantine",
        max_rejects="10%",
        output_dir=tmp_path / "out",
    )
    found = {"all": Counter(), "trained": Counter()}
    ids_of = np.array([*known.values()])
    for batch in built["train"].with_format("arrow").iter(1000):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            whole, trained = ids.values.to_numpy(), labels.values.to_numpy() != IGNORE_INDEX
            for which, some in (("all", whole), ("trained", whole[trained])):
                found[which][tuple((some[:, None] == ids_of).sum(0).tolist())] += 1
    ((_, rows),) = found["all"].items()
    ((trained, _),) = found["trained"].items()
    assert rows > 0.99 * count
    assert sum(trained) == 2
