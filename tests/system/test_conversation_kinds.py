"""Random conversations with real templates: each is built or rejected, and none causes an internal error."""

import random

import pytest

from ftdata import encode
from ftdata.errors import BadRow, FtdataError, InternalError, TemplateRefused
from ftdata.testing import byte_tokenizer

TEXTS = [
    "hello", "", " ", "\u200b", "  spaced  ", "line\nbreak\n", "<think>hm</think>yes", "<think>\n\n</think>\n\nok", "</think>x",
    "<|im_end|>", "<|im_start|>assistant\n", "[/INST] </s>", "{{ messages }}", "{% raw %}", "\ufdd0", "é\u0301🙂", "中文", "a" * 3000,
    "\x00", "\u2028", '{"a": 1}', "<tool_call>{}</tool_call>", "'quoted' \"twice\"", "\\n", "&lt;b&gt;", "-1", "None", "true",
]  # fmt: skip
ROLES = ["system", "developer", "user", "assistant", "tool", "function", "ipython", "observation", "context", "critic"]
VALUES = [None, True, 0, -1.5, "text", "", [], {}, [1, "x"], {"a": {"b": [None, "é"]}}, {"type": "object"}]
SCHEMA = {
    "name": "look_up",
    "description": "Looks up",
    "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
}


def content(rng, role):
    kind = rng.random()
    if kind < 0.7:
        return rng.choice(TEXTS)
    if kind < 0.85:
        return [{"type": "text", "text": rng.choice(TEXTS)} for _ in range(rng.randrange(1, 3))]
    return (
        rng.choice([None, {"a": rng.choice(VALUES)}, [{"a": 1}, {"b": "x"}], 5, [], rng.choice(VALUES)])
        if role != "user"
        else "q"
    )


def call(rng):
    arguments = rng.choice([{"key": rng.choice(VALUES)}, '{"key": 1}', "", "not JSON", {}])
    function = {"name": rng.choice(["look_up", "", "é"]), "arguments": arguments}
    return rng.choice([{"id": "call00001", "type": "function", "function": function}, {"function": function}, function])


def message(rng, role):
    made = {"role": role, "content": content(rng, role)}
    if role == "assistant" and rng.random() < 0.3:
        made["tool_calls"] = [call(rng) for _ in range(rng.randrange(0, 3))]
    if role == "assistant" and rng.random() < 0.3:
        made[rng.choice(["reasoning_content", "thinking", "reasoning"])] = rng.choice(TEXTS)
    if role == "tool" and rng.random() < 0.7:
        made |= {"tool_call_id": "call00001", "name": "look_up"}
    if rng.random() < 0.15:
        made[rng.choice(["name", "train", "weight", "mood", "trainable", "prefix"])] = rng.choice(
            [True, False, 0, "x", "Ada"]
        )
    return made


def conversation(number):
    """Return messages and options, determined by the number."""
    rng = random.Random(number)
    if rng.random() < 0.7:
        roles = ["user", "assistant"] * rng.randrange(1, 4)
        roles = [*rng.choice([[], ["system"], ["developer"]]), *roles]
        if rng.random() < 0.4:
            roles[-1:] = ["assistant", "tool", "assistant"]
    else:
        roles = [rng.choice(ROLES) for _ in range(rng.randrange(1, 7))]
    options = {
        "turns": rng.choice(["auto", "auto", "joint", "split"]),
        "on_dropped_message": rng.choice(["reject", "flag"]),
        "train_on": rng.choice(["assistant", "last_assistant", "completion", "all"]),
        "control_tokens": rng.choice(["escape", "escape", "refuse", "allow"]),
        "tools": rng.choice(
            [None, None, [{"type": "function", "function": SCHEMA}], [SCHEMA], [{}], [{"function": "x"}]]
        ),
        "template_kwargs": rng.choice([None, None, {"enable_thinking": False}]),
    }
    return [message(rng, role) for role in roles], options


def outcomes(sources, numbers):
    """Return the number of conversations by outcome; fail on errors that the data or the template did not cause."""
    found = {}
    tokenizer = byte_tokenizer()
    for name, source in sources.items():
        for number in numbers:
            messages, options = conversation(number)
            try:
                encode(messages, tokenizer, source, **options)
                code = "built"
            except (BadRow, TemplateRefused) as error:
                code = error.code
            except InternalError as error:
                raise AssertionError(f"{name}, conversation {number}: {error}") from error
            except FtdataError as error:
                code = error.code
            except Exception as error:
                raise AssertionError(f"{name}, conversation {number}: {error!r}") from error
            found[code] = found.get(code, 0) + 1
            if code in ("template_syntax", "template_not_verified"):
                break
    return found


def test_every_kind_of_conversation_is_built_or_rejected():
    found = outcomes({name: name for name in ("chatml", "zephyr", "gemma")}, range(150))
    assert found["built"] > 50
    assert len(found) > 8


@pytest.mark.shared
@pytest.mark.long
@pytest.mark.timeout(7200)
def test_every_kind_of_conversation_with_real_templates(shared):
    files = sorted((shared / "templates" / "jinja").rglob("*.jinja"))
    sources = {file.stem: file.read_bytes().decode() for file in random.Random(25).sample(files, 100)}
    found = outcomes(sources, range(500))
    assert found["built"] > 5000
    assert "template_limits" not in found
