"""Rows with served tokens: exactly the generated tokens are trained, and every difference from the template is found."""

import json
import random

import numpy as np
import pytest
from cases import long
from hypothesis import given
from hypothesis import strategies as st
from laws import often

from ftdata import audit, build_sft_dataset, encode, preview
from ftdata.build.dataset import write_build
from ftdata.errors import InputRefused
from ftdata.inspection.html_page import HtmlPage
from ftdata.pipeline.drift import find_drift
from ftdata.pipeline.recipe import make_recipe
from ftdata.schemas import normalize
from ftdata.schemas.served_tokens import split_turns
from ftdata.testing import text_strategy
from ftdata.types import Row, Source

TEXTS = ["hi", "What is 2 + 2?", " It is 4.", "naïve\n\n年號", "a  b", "ok", "<|im_end|> typed"]


def serve(messages, tokenizer, template=None):
    """Return the prompts and the completions of a server that renders the template."""
    prompts, completions = [], []
    for example in encode(messages, tokenizer, template):
        ids = example.input_ids.tolist()
        edges = np.flatnonzero(np.diff(example.trained.astype(int), prepend=0, append=0)).tolist()
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            prompts.append(ids[:start])
            completions.append(ids[start:end])
    return prompts, completions


def make_talk(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def read(data):
    return normalize(Row(data, Source("data.jsonl", 0, 1)))


def drifts_of_parts(data, recipe):
    """Return the differences of each example that the row becomes."""
    return [find_drift(normalize(part), recipe) for part in split_turns([Row(data, Source("data.jsonl", 0, 1))])]


def change_token(prompts, completions, tokenizer, generator):
    number = generator.randrange(len(prompts))
    position = generator.randrange(1, len(prompts[number]))
    prompts[number] = [*prompts[number]]
    prompts[number][position] = (prompts[number][position] + 1) % 200 + 30
    return number


def add_token_at_the_start(prompts, completions, tokenizer, generator):
    for number, prompt in enumerate(prompts):
        prompts[number] = [40, *prompt]
    return 0


def divide_a_token(prompts, completions, tokenizer, generator):
    """A server samples tokens that the tokenizer would join, e.g. `n`, `o` for `no`."""
    number = generator.randrange(len(prompts))
    completions[number] = [completions[number][0], *completions[number]]
    for later in range(number + 1, len(prompts)):
        prompts[later] = [
            *prompts[number],
            *completions[number],
            *prompts[later][len(prompts[number]) + len(completions[number]) - 1 :],
        ]
    return number


def drop_the_stop_token(prompts, completions, tokenizer, generator):
    completions[-1] = completions[-1][:-1]
    return len(completions) - 1


INJECTIONS = [change_token, add_token_at_the_start, divide_a_token, drop_the_stop_token]


@pytest.mark.parametrize("name", ["tiny_bpe", long("qwen")])
@often(40)
@given(
    texts=st.lists(st.sampled_from(TEXTS) | text_strategy(), min_size=1, max_size=3),
    seed=st.integers(0, 1 << 20),
    data=st.data(),
)
def test_sampled_tokens_are_trained_and_drift_is_found(tokenizer_dir, name, texts, seed, data):
    generator, tokenizer = random.Random(seed), tokenizer_dir(name)
    messages = make_talk(*(side for text in texts for side in (text, "yes " + text)))
    prompts, completions = serve(messages, tokenizer)
    equal = {"messages": messages, "prompt_token_ids": prompts, "completion_token_ids": completions}
    recipe = make_recipe(tokenizer)
    assert not any(drifts_of_parts(equal, recipe))
    inject = data.draw(st.sampled_from(INJECTIONS))
    prompts, completions = [*prompts], [*completions]
    turn = inject(prompts, completions, tokenizer, generator)
    row = {"messages": messages, "prompt_token_ids": prompts, "completion_token_ids": completions}
    built = build_sft_dataset([equal, row], tokenizer)
    trained = [token for example in built["train"] for token in example["labels"] if token != -100]
    assert trained == [token for ids in (*equal["completion_token_ids"], *completions) for token in ids]
    for example in built["train"]:
        assert all(label in (-100, id_) for label, id_ in zip(example["labels"], example["input_ids"], strict=True))
    # The row is split where a prompt does not begin with the turns before, so turns are counted within each part.
    report = audit([row], tokenizer).as_dict()
    (finding,) = [one for one in report["findings"] if one["code"] == "drift"]
    assert finding["count"] >= 1
    drifts = drifts_of_parts(row, recipe)
    assert finding["count"] == sum(map(bool, drifts))
    if len(drifts) == 1:
        assert drifts[0][0].turn == turn


def test_only_the_first_difference_of_a_turn_is_described(tokenizer_dir):
    tokenizer = tokenizer_dir("tiny_bpe")
    messages = make_talk("hi", "yes", "and?", "no")
    prompts, completions = serve(messages, tokenizer)
    prompts[1] = [*prompts[1][:-1], 35, 36]
    row = {"messages": messages, "prompt_token_ids": prompts, "completion_token_ids": completions}
    (drift,) = find_drift(read(row), make_recipe(tokenizer))
    assert (drift.turn, drift.place, drift.rendered) == (1, "prompt", r"'\n'")
    assert (
        str(drift)
        == f"turn 1, token {len(prompts[1]) - 2} of the prompt: the server used {drift.served}, and the template renders '\\n'"
    )
    page = preview([row], tokenizer)
    assert f"drift: {drift}" in str(page)
    assert isinstance(page, HtmlPage) is False
    html = page.html() if hasattr(page, "html") else page._repr_html_()
    assert "drift: turn 1" in html


def test_tools_and_template_variables_of_a_row_are_rendered(tokenizer_dir):
    tokenizer = tokenizer_dir("qwen")
    messages = make_talk("hi", "yes")
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    prompts, completions = serve({"messages": messages, "tools": tools}["messages"], tokenizer)
    row = {"messages": messages, "tools": tools, "prompt_token_ids": prompts, "completion_token_ids": completions}
    assert find_drift(read(row), make_recipe(tokenizer))[0].place == "prompt"
    assert find_drift(read({**row, "tools": []}), make_recipe(tokenizer)) == []


def test_text_columns_are_compared(tokenizer_dir):
    tokenizer = tokenizer_dir("tiny_bpe")
    prompts, completions = serve(make_talk("hi", "yes"), tokenizer)
    row = {"prompt": "hi", "completion": "yes", "prompt_token_ids": prompts[0], "completion_token_ids": completions[0]}
    assert find_drift(read(row), make_recipe(tokenizer)) == []
    assert find_drift(read({**row, "prompt": "ho"}), make_recipe(tokenizer))[0].place == "prompt"


def test_messages_that_the_template_refuses_are_reported(tokenizer_dir):
    tokenizer = tokenizer_dir("tiny_bpe")
    template = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no!') }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    row = {"messages": make_talk("no", "yes"), "prompt_token_ids": [40, 41], "completion_token_ids": [42, 2]}
    (finding,) = [one for one in audit([row], tokenizer, template).as_dict()["findings"] if one["code"] == "drift"]
    assert "cannot be compared" in json.dumps(finding)
    assert build_sft_dataset([row], tokenizer, template)["train"][0]["labels"] == [-100, -100, 42, 2]


def test_rows_without_messages_have_no_drift(tokenizer_dir):
    row = {"prompt_token_ids": [40, 41], "completion_token_ids": [42, 2], "id": "x"}
    assert find_drift(read(row), make_recipe(tokenizer_dir("tiny_bpe"))) == []
    assert audit([row], tokenizer_dir("tiny_bpe")).as_dict()["findings"] == []


def test_turns_are_joined_only_if_their_prompts_continue(tokenizer_dir, tmp_path):
    rows = [
        {"prompt_token_ids": [[40], [40, 41, 42]], "completion_token_ids": [[41], [43, 2]]},
        {"prompt_token_ids": [[40], [40, 44, 42], [40, 44, 42, 43, 45]], "completion_token_ids": [[41], [43], [2]]},
    ]
    report = write_build(rows, tokenizer_dir("tiny_bpe"), tmp_path / "built")
    assert "whose prompts do not begin with the tokens of the turns before: 2 rows" in str(report)
    built = build_sft_dataset(rows, tokenizer_dir("tiny_bpe"))["train"]
    assert [(row["input_ids"], row["labels"]) for row in built] == [
        ([40, 41, 42, 43, 2], [-100, 41, -100, 43, 2]),
        ([40, 41], [-100, 41]),
        ([40, 44, 42, 43, 45, 2], [-100, -100, -100, 43, -100, 2]),
    ]
    # The build is read back like any other build.
    assert "[-100, 41]" in str(
        [row["labels"] for row in build_sft_dataset(tmp_path / "built", tokenizer_dir("tiny_bpe"))["train"]]
    )


def test_turns_can_be_excluded(tokenizer_dir):
    tokenizer = tokenizer_dir("tiny_bpe")
    messages = make_talk("hi", "yes", "and?", "no")
    prompts, completions = serve(messages, tokenizer)
    row = {"prompt_token_ids": prompts, "completion_token_ids": completions}
    for excluded in ((), (0,), (1,)):
        said = [{**one, "train": False} if n // 2 in excluded and n % 2 else one for n, one in enumerate(messages)]
        (example,) = build_sft_dataset([{**row, "messages": said}], tokenizer)["train"]
        expected = [token for turn, ids in enumerate(completions) if turn not in excluded for token in ids]
        assert [label for label in example["labels"] if label != -100] == expected
    with pytest.raises(InputRefused, match="no trained token"):
        build_sft_dataset(
            [{**row, "messages": [{**one, "train": one["role"] == "user"} for one in messages]}], tokenizer
        )


def test_earlier_answers_are_context(tokenizer_dir):
    """The turns are the last answers of the messages, also if the row is split."""
    tokenizer = tokenizer_dir("tiny_bpe")
    messages = make_talk("x", "y", "hi", "yes", "and?", "no")
    prompts, completions = (ids[1:] for ids in serve(messages, tokenizer))
    row = {
        "messages": messages,
        "prompt_token_ids": [prompts[0], [40, *prompts[1]]],
        "completion_token_ids": completions,
    }
    first, second = drifts_of_parts(row, make_recipe(tokenizer))
    assert (first, second[0].position) == ([], 0)
    # The text columns of a row belong to its last turn, so the parts of a divided row are not compared with them.
    texts = {"prompt": "hi", "completion": "no", **{name: row[name] for name in row if name != "messages"}}
    assert drifts_of_parts(texts, make_recipe(tokenizer)) == [[], []]


def test_columns_can_have_other_names(tokenizer_dir):
    rows = [{"p": [[40], [44]], "c": [[41], [43, 2]]}]
    columns = {"prompt_token_ids": "p", "completion_token_ids": "c"}
    assert len(build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), columns=columns)["train"]) == 2


GOOD = {"prompt_token_ids": [40, 41], "completion_token_ids": [42, 2]}


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"prompt_token_ids": "x"}, "prompt_token_ids", "expected a list of token ids"),
        ({"prompt_token_ids": [40, -1]}, "prompt_token_ids[1]", "expected a token id"),
        ({"prompt_token_ids": [40, 1.0]}, "prompt_token_ids[1]", "expected a token id"),
        ({"prompt_token_ids": [40, True]}, "prompt_token_ids[1]", "expected a token id"),
        ({"prompt_token_ids": [40, 1 << 31]}, "prompt_token_ids[1]", "expected a token id"),
        ({"prompt_token_ids": [40, 999_999]}, "prompt_token_ids[1]", "not in the vocabulary"),
        ({"completion_token_ids": [40, 999_999]}, "completion_token_ids[1]", "not in the vocabulary"),
        ({"completion_token_ids": []}, "completion_token_ids", "the list is empty"),
        ({"completion_token_ids": [[42], []]}, "completion_token_ids", "1 prompt and 2 completions"),
        ({"prompt_token_ids": [[40], [40, 42]], "completion_token_ids": [[42], []]}, "completion_token_ids[1]", "is empty"),
        ({"prompt_token_ids": [[40], [41]], "completion_token_ids": [[42], ["x"]]}, "completion_token_ids[1][0]", "expected a token id"),
        ({"logprobs": [-1.0]}, "logprobs", "differs from the number of tokens"),
        ({"logprobs": [-1.0, 0.5]}, "logprobs[1]", "at most 0"),
        ({"logprobs": [-1.0, float("nan")]}, "logprobs[1]", "at most 0"),
        ({"logprobs": [-1.0, None]}, "logprobs[1]", "at most 0"),
        ({"logprobs": "x"}, "logprobs", "expected a list of numbers"),
        ({"logprobs": [[-1.0, -1.0], [-1.0]]}, "", ""),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "0 answers, but the row has 1 turn"),
        ({"messages": make_talk("a", "b"), "prompt_token_ids": [[40], [40]], "completion_token_ids": [[41], [41]]}, "prompt_token_ids[1]", "differs at token 1"),
        ({"messages": [{"role": "user"}]}, "messages[0]", ""),
        ({"loss_mask": [0, 0, 1, 1]}, "loss_mask", ""),
    ],
)  # fmt: skip
def test_bad_rows_are_rejected_with_their_field(change, field, message, tokenizer_dir):
    if not field:
        assert len(build_sft_dataset([{**GOOD, **change}], tokenizer_dir("tiny_bpe"))["train"]) == 1
        return
    with pytest.raises(InputRefused) as caught:
        build_sft_dataset([GOOD, {**GOOD, **change}], tokenizer_dir("tiny_bpe"))
    assert f"<memory>[1] {field}" in str(caught.value)
    assert message in str(caught.value)
