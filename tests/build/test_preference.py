"""Preference pairs: the masks of both sides, rows that are not pairs, and steps that act on the pair."""

import numpy as np
import pytest
from chat_templates import HEAD, TURN, template
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_makers import CHATML

from ftdata import audit, build_preference_dataset, encode, export, preview, stats
from ftdata.build.dataset import write_build
from ftdata.build.read_packs import list_pack_files, read_pack_file
from ftdata.errors import BadRows, InputRefused, UsageError
from ftdata.pipeline.read_rows import read_conversation
from ftdata.pipeline.recipe import Options
from ftdata.testing import byte_tokenizer
from ftdata.types import UNKNOWN_SOURCE, Row


def talk(*contents):
    """Return messages of user and assistant in turn."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


def sides_of(row):
    """Return the ids and labels of both sides of a built pair."""
    prompt = row["prompt_ids"]
    return [
        (prompt + row[f"{side}_ids"], [-100] * len(prompt) + row[f"{side}_labels"]) for side in ("chosen", "rejected")
    ]


def expected_side(messages, first, source=CHATML):
    """Return the ids and labels of one side: those of supervised fine-tuning, from message `first` on."""
    earlier = [
        {**message, "train": False} if message["role"] == "assistant" else message for message in messages[:first]
    ]
    (example,) = encode([*earlier, *messages[first:]], byte_tokenizer(), source)
    return example.input_ids.tolist(), example.labels.tolist()


texts = st.text("ab<|im_end>\n é", min_size=1, max_size=8).filter(lambda text: text.strip())


@settings(deadline=None, max_examples=50)
@given(st.lists(texts, min_size=1, max_size=3), texts, texts, st.lists(texts, max_size=2))
def test_sides_equal_supervised_fine_tuning_from_the_first_difference(before, chosen, rejected, after):
    prompt = before if len(before) % 2 else before[:-1]
    left, right = talk(*prompt, chosen, *after[: len(after) // 2 * 2]), talk(*prompt, rejected)
    if chosen == rejected:
        return
    ds = build_preference_dataset([{"chosen": left, "rejected": right}], byte_tokenizer(), CHATML)
    first = len(prompt)
    assert sides_of(ds["train"][0]) == [expected_side(left, first), expected_side(right, first)]


def test_collator_of_trl_reads_the_rows(tokenizer_dir):
    """In single turns, the mask of TRL is the whole completion. The labels exclude only the text after the stop token."""
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    rows = [{"prompt": f"question {n}", "chosen": f"good {n}", "rejected": f"bad answer {n}"} for n in range(4)]
    ds = build_preference_dataset(rows, tokenizer_dir("tiny_bpe"), CHATML)["train"]
    batch = dpo.DataCollatorForPreference(pad_token_id=0)(ds.to_list())
    for number, row in enumerate(ds.to_list()):
        for place, (ids, labels) in zip((number, number + 4), sides_of(row), strict=True):
            assert batch["input_ids"][place][: len(ids)].tolist() == ids
            completion = np.flatnonzero(batch["completion_mask"][place].numpy())
            assert completion.tolist() == list(range(len(row["prompt_ids"]), len(ids)))
            trained = np.flatnonzero(np.array(labels) != -100)
            assert trained.tolist() == completion.tolist()[:-1]  # the line break after <|im_end|>


TOOLS = [
    {"role": "user", "content": "weather?"},
    {"role": "assistant", "content": "look up"},
    {"role": "tool", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]


def test_tool_results_in_a_completion_are_not_trained():
    """TRL trains the tool result, because everything after the prompt is trained."""
    rejected = [TOOLS[0], {"role": "assistant", "content": "It is raining."}]
    row = build_preference_dataset([{"chosen": TOOLS, "rejected": rejected}], byte_tokenizer(), CHATML)["train"][0]
    trained = [token for token in row["chosen_labels"] if token != -100]
    assert bytes(min(token, 255) for token in trained) == b"look up\xffIt is sunny.\xff"  # 257 is <|im_end|>


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical_sides"),
        ({"chosen": talk("q", "a"), "rejected": talk("other", "a")}, "prompt_differs"),
        ({"chosen": talk("q", "a", "b", "c"), "rejected": talk("q", "a")}, "no_answer"),
        ({"question": "q", "answer": "a"}, "not_a_pair"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "missing_column"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty_answer"),
        ({"prompt": "q", "chosen": "a", "rejected": " \n"}, "empty_answer"),
        ({"prompt": "q", "chosen": "a", "rejected": 5}, "type"),
        ({"prompt": "q", "chosen": [], "rejected": []}, "no_messages|unknown_schema"),
        ({"chosen": talk("q", "a"), "rejected": [*talk("q", "b"), {"role": "alien", "content": "x"}]}, "unknown_role"),
        ({"chosen": "a", "rejected": "b"}, "no_prompt"),
        ({"messages": talk("q", "a")}, "not_a_pair"),
        ({"prompt": "q", "chosen": talk("other", "a"), "rejected": talk("q", "b")}, "prompt_differs"),
    ],
)
def test_rows_that_are_not_pairs_are_rejected(row, code):
    with pytest.raises(BadRows, match=rf"\[({code}|\w*_{code})\]"):
        build_preference_dataset([row], byte_tokenizer(), CHATML)


def test_both_sides_are_rejected_if_one_side_is_too_long():
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b" * 100}, {"prompt": "q", "chosen": "a", "rejected": "b"}]
    for overlong in ("reject", "drop_turns"):
        ds = build_preference_dataset(rows, byte_tokenizer(), CHATML, max_length=60, overlong=overlong)
        assert len(ds["train"]) == 1
        assert ds.report.total("rejected") == 1
    (first, _) = build_preference_dataset(rows, byte_tokenizer(), CHATML, max_length=60, overlong="truncate")["train"]
    assert [len(ids) for ids, _ in sides_of(first)] == [23, 60]


def test_pairs_whose_earlier_turns_are_rewritten_are_rejected():
    """The template prints "thought" only in the last answer, so no single text is correct for two trained turns."""
    source = template(HEAD + "{% if m.role == 'assistant' and loop.last %}thought {% endif %}" + TURN)
    both = {"chosen": talk("q", "a", "r", "b"), "rejected": talk("q", "c", "r", "d")}
    with pytest.raises(BadRows, match="pair_split.*2 examples"):
        build_preference_dataset([both], byte_tokenizer(), source)
    last = {"chosen": talk("q", "a", "r", "b"), "rejected": talk("q", "a", "r", "d")}
    row = build_preference_dataset([last], byte_tokenizer(), source)["train"][0]
    assert sides_of(row) == [expected_side(last[side], 3, source) for side in ("chosen", "rejected")]


def test_pairs_stay_together_in_splits_and_files(tokenizer_dir, tmp_path):
    rows = [{"prompt": f"q {n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(30)]
    rows += rows[:5]
    options = {"template": "chatml", "task": "preference", "test_size": 6, "dedup": True, "shuffle": True}
    write_build(rows, tokenizer_dir("tiny_bpe"), tmp_path / "built", **options)
    ds = load_from_disk(tmp_path / "built")
    assert (len(ds["train"]), len(ds["test"])) == (24, 6)
    (path,) = list_pack_files(tmp_path / "built", "train")
    (packs,) = read_pack_file(path)
    documents = [
        (packs.ids[start:end].tolist(), packs.labels[start:end].tolist())
        for start, end in zip(packs.token_bounds[:-1], packs.token_bounds[1:], strict=True)
    ]
    assert documents == [side for row in ds["train"].to_list() for side in sides_of(row)]
    assert packs.document_bounds.tolist() == list(range(0, 49, 2))
    shown = str(preview(tmp_path / "built", n=2))
    assert "pair 0 ·" in shown


def test_near_duplicates_compare_both_sides():
    pytest.importorskip("rensa")
    words = [f"{word} {number}" for number in range(40) for word in ("one", "two", "three")]
    question, left, right = " ".join(words[:40]), " ".join(words[40:80]), " ".join(words[80:])
    rows = [{"prompt": question, "chosen": left, "rejected": text} for text in (left + " end", left + " end.", right)]
    ds = build_preference_dataset(
        rows, byte_tokenizer(), CHATML, dedup=True, near_duplicate_threshold=0.8, max_length=4096
    )
    assert len(ds["train"]) == 2


def test_preview_names_the_sides():
    rows = [{"prompt": "q", "chosen": "good", "rejected": "bad"}]
    shown = str(preview(rows, byte_tokenizer(), "chatml", task="preference"))
    assert "── chosen ──" in shown
    assert "── rejected ──" in shown
    assert "rejected_side_dropped" not in shown
    assert "── rejected ──" in str(preview(rows, task="preference"))


def test_unsupported_uses_of_pairs_are_refused(tokenizer_dir, tmp_path):
    rows = [{"prompt": "q", "chosen": "good", "rejected": "bad"}]
    write_build(rows, tokenizer_dir("tiny_bpe"), tmp_path / "built", template="chatml", task="preference")
    with pytest.raises(InputRefused, match="export_task"):
        export(tmp_path / "built", "trl", tmp_path / "out")
    assert "preference pairs with the token ids" in (tmp_path / "built" / "README.md").read_text()
    with pytest.raises(UsageError, match="would train the prompts"):
        build_preference_dataset(rows, byte_tokenizer(), "chatml", train_on="all")
    with pytest.raises(UsageError, match="cannot be packed"):
        build_preference_dataset(rows, byte_tokenizer(), "chatml", max_length=64, packing="bfd")
    with pytest.raises(UsageError, match="task is 'preferences'"):
        write_build(rows, byte_tokenizer(), tmp_path / "other", template="chatml", task="preferences")


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        (
            {"prompt": "q", "chosen": "one two three", "rejected": "one two four"},
            {"max_length": 27, "overlong": "truncate"},
            "raise max_length",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "a "}, {}, "because the template omits the difference"),
    ],
)
def test_sides_with_identical_tokens_are_rejected(row, options, reason):
    template = CHATML.replace("message['content']", "message['content'] | trim").replace(
        "message.content", "message.content | trim"
    )
    with pytest.raises(BadRows, match=f"identical_sides.*{reason}"):
        build_preference_dataset([row], byte_tokenizer(), template, **options)


def test_empty_side_is_named():
    with pytest.raises(BadRows, match="empty_answer.* rejected: .*Fix: remove the row, or add the answer"):
        build_preference_dataset([{"prompt": "q", "chosen": "a", "rejected": " "}], byte_tokenizer(), "chatml")


@pytest.mark.parametrize("options", [{"packing": "bfd"}, {"task": "sft"}])
def test_options_that_pairs_cannot_have_are_refused(options):
    with pytest.raises(UsageError, match="packed|task"):
        build_preference_dataset(
            [{"prompt": "q", "chosen": "a", "rejected": "b"}], byte_tokenizer(), "chatml", **options
        )


def test_first_difference_after_equal_words_is_shown(tokenizer_dir):
    rows = [{"prompt": "q", "chosen": "yes and more\nwords", "rejected": "yes and"}]
    for tokenizer in (tokenizer_dir("tiny_bpe"), None):
        shown = str(preview(rows, tokenizer, "chatml"))
        assert "first difference: chosen:  more↵words<|im_end| / rejected: <|im_end|>↵" in shown


def test_preview_of_a_build_names_the_sides(tokenizer_dir, tmp_path):
    rows = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(2)]
    write_build(rows, tokenizer_dir("tiny_bpe"), tmp_path / "built", template=CHATML, task="preference")
    (only,) = preview(tmp_path / "built", n=1).rows
    assert [example.text.splitlines()[-1] for example in only.examples] == ["good<|im_end|>", "bad<|im_end|>"]
    shown = str(preview(tmp_path / "built", row=1))
    assert "── pair 1 · <memory>" in shown
    assert shown.count("q1") == 1  # the prompt of both sides is printed once
    assert "first difference" not in shown  # because the displayed sides begin with it
    assert shown.index("── chosen ──") < shown.index("good") < shown.index("── rejected ──") < shown.index("bad")


def test_builds_of_pairs_are_inspected_like_their_rows(tokenizer_dir, tmp_path):
    """A packed build can separate the examples of a row, but a pair is always one row."""
    rows = [{"prompt": f"question {n}", "chosen": "a longer answer", "rejected": "short"} for n in range(60)]
    write_build(rows, tokenizer_dir("tiny_bpe"), tmp_path / "built", template=CHATML, task="preference")
    source = {"tokenizer": tokenizer_dir("tiny_bpe"), "template": CHATML, "task": "preference"}
    for report in (audit(tmp_path / "built"), audit(rows, **source)):
        assert {one.code: one.count for one in report.findings} == {"length_bias": 1}
    built, read = (str(stats(tmp_path / "built")), str(stats(rows, **source)))
    assert " 60       120 " in built
    assert " 60       120 " in read


@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_pair_that_is_too_long_after_another_pair_is_rejected(task):
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    rows = [pair, {**pair, "chosen": "much too long " * 9}, {**pair, "rejected": "much too long " * 9}, pair]
    options = {"max_length": 60, "task": task, "on_bad_rows": "quarantine", "max_rejects": 2}
    ds = build_preference_dataset(rows, byte_tokenizer(), CHATML, **options)
    assert len(ds["train"]) == 2
    assert [reject.split()[:3:2] for reject in ds.report.rejects] == [
        ["[overlong]", "chosen:"],
        ["[overlong]", "rejected:"],
    ]


def split_prompts(ds):
    """Return the prompts of each split."""
    return [{tuple(row["prompt_ids"]) for row in ds[name]} for name in ("train", "test")]


def test_pairs_with_the_same_prompt_are_in_the_same_split():
    rows = [
        {"prompt": f"q{number % 10}", "chosen": f"good {number}", "rejected": f"bad {number}"} for number in range(40)
    ]
    train, test = split_prompts(build_preference_dataset(rows, byte_tokenizer(), CHATML, test_size=0.3))
    assert len(train) + len(test) == 10
    assert train.isdisjoint(test)


def test_pairs_of_ranked_lists_are_selected_one_by_one():
    rows = [{"prompt": "q", "completions": ["a", "b", last]} for last in "cdc"]
    ds = build_preference_dataset(rows, byte_tokenizer(), CHATML, dedup=True)
    assert len(ds["train"]) == 5  # a > b, a > c, b > c, a > d, b > d
    lists = [{"prompt": f"q{number}", "completions": ["a", "b", "c"]} for number in range(10)]
    train, test = split_prompts(build_preference_dataset(lists, byte_tokenizer(), CHATML, test_size=6))
    assert train.isdisjoint(test)


def test_margins_are_part_of_the_content():
    pair = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    built = [build_preference_dataset([{**pair, "margin": margin}], byte_tokenizer(), CHATML) for margin in (1, 2)]
    assert built[0].report.fingerprint != built[1].report.fingerprint
    both = [{**pair, "margin": margin} for margin in (1, 2, 1)]
    ds = build_preference_dataset(both, byte_tokenizer(), CHATML, dedup=True)
    assert ds["train"]["margin"] == [1.0, 2.0]


def trained_texts(row):
    """Return the trained text of both sides of a built pair, with ■ for the stop token of `byte_tokenizer`."""
    labels = (row[f"{side}_labels"] for side in ("chosen", "rejected"))
    return ["".join("■" if label == 257 else chr(label) for label in side if label != -100) for side in labels]


def test_completion_of_a_pair_begins_at_the_first_difference():
    row = {"prompt": talk("a"), "chosen": talk("", "b1", "c", "d1")[1:], "rejected": talk("", "b2", "c", "d2")[1:]}
    for train_on in ("completion", "assistant"):
        ds = build_preference_dataset([row], byte_tokenizer(), CHATML, train_on=train_on)
        assert trained_texts(ds["train"][0]) == ["b1■d1■", "b2■d2■"]


def test_train_fields_do_not_make_shared_messages_different():
    chosen, rejected = talk("a", "b", "c", "d1"), talk("a", "b", "c", "d2")
    chosen[1]["train"] = False
    row = {"chosen": chosen, "rejected": rejected}
    ds = build_preference_dataset([row], byte_tokenizer(), CHATML)
    assert trained_texts(ds["train"][0]) == ["d1■", "d2■"]
    with pytest.raises(BadRows, match="identical_sides.*apart from their train fields"):
        build_preference_dataset([{"chosen": chosen, "rejected": talk("a", "b", "c", "d1")}], byte_tokenizer(), CHATML)


def train_everything(rendered, conversation):
    return [True for _ in rendered.spans]


def train_generated(rendered, conversation):
    return [span.generated and span.message >= conversation.completion_from for span in rendered.spans]


@pytest.mark.parametrize("task", ["preference", "kto"])
def test_mask_functions_cannot_train_the_prompt(task):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    row = row if task == "preference" else {"prompt": "q", "completion": "a", "label": True}
    with pytest.raises(UsageError, match="mask_prompt"):
        build_preference_dataset([row], byte_tokenizer(), CHATML, task=task, train_on=train_everything)
    built = [
        build_preference_dataset([row], byte_tokenizer(), CHATML, task=task, train_on=train_on)["train"][0]
        for train_on in (train_generated, "assistant")
    ]
    assert built[0] == built[1]


@pytest.mark.parametrize("schema", ["alpaca", "messages", "./mine.py:convert"])
def test_schemas_that_read_no_pairs_are_refused(schema, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def convert(row): ...\n")
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(UsageError, match="does not read preference pairs"):
        build_preference_dataset([row], byte_tokenizer(), CHATML, schema=schema)


def test_shortened_sides_end_like_complete_sides():
    """A reward model scores the last token, so the text after the stop token must not show which side was shortened."""
    row = {"chosen": talk("new", "c1", "more", "c2 " * 40), "rejected": talk("new", "r1")}
    options = {"max_length": 60, "overlong": "drop_turns"}
    built = build_preference_dataset([row], byte_tokenizer(), CHATML, **options)["train"][0]
    assert trained_texts(built) == ["c1■", "r1■"]
    assert built["chosen_ids"][-2:] == built["rejected_ids"][-2:]
    tight = {**options, "max_length": len(built["prompt_ids"] + built["chosen_ids"]) - 1}
    assert build_preference_dataset([row], byte_tokenizer(), CHATML, **tight)["train"][0]["chosen_ids"][-1] == 257


def call(name, arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("left", "right"), [({"n": 1}, {"n": True}), ({"n": 1}, {"n": 1.0}), ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
)
def test_values_that_compare_equal_but_are_printed_differently_are_the_first_difference(left, right):
    source = CHATML.replace("{{ message.content }}", "{{ message.content }}{{ message.tool_calls | tojson }}")
    assert source != CHATML
    sides = {
        side: [call("w", arguments), {"role": "user", "content": "more"}, {"role": "assistant", "content": side}]
        for side, arguments in (("chosen", left), ("rejected", right))
    }
    pair = read_conversation(Row({"prompt": "q", **sides}, UNKNOWN_SOURCE), Options(task="preference"))
    assert pair.completion_from == 1
    assert all("train" not in side.messages[1] for side in pair.sides)


def test_last_answers_of_long_sides_are_one_text(tokenizer_dir):
    """With other masks, the template of Qwen needs one text per turn."""
    row = {"prompt": talk("q"), "chosen": talk("", "a1", "q2", "a2")[1:], "rejected": talk("", "b1")[1:]}
    with pytest.raises(BadRows, match="pair_split"):
        build_preference_dataset([row], tokenizer_dir("qwen"))
    (shown,) = preview([row], tokenizer_dir("qwen"), train_on="last_assistant").rows
    for view, answers in zip(shown.examples, (["a2"], ["b1"]), strict=True):
        trained = "".join(piece for piece, is_trained in zip(view.pieces, view.trained, strict=True) if is_trained)
        assert [one for one in ("a1", "a2", "b1") if one in trained] == answers


def test_pairs_without_a_difference_in_the_trained_part_are_rejected(tokenizer_dir):
    sides = {
        side: [{"role": "assistant", "content": side, "reasoning_content": "same"}] for side in ("chosen", "rejected")
    }
    with pytest.raises(BadRows, match="identical_sides.*up to the last trained token"):
        build_preference_dataset([{"prompt": "q", **sides}], tokenizer_dir("qwen"), train_parts=["reasoning"])


def test_openai_rows_are_read(tokenizer_dir):
    row = {
        "input": {"messages": talk("q"), "tools": []},
        "preferred_output": talk("", "a")[1:],
        "non_preferred_output": talk("", "b")[1:],
    }
    for task in ("auto", "preference"):
        (shown,) = preview([row], tokenizer_dir("tiny_bpe"), CHATML, task=task).rows
        assert [example.text.rstrip().rpartition("\n")[2] for example in shown.examples] == [
            "a<|im_end|>",
            "b<|im_end|>",
        ]


def test_rows_with_labels_are_not_pairs():
    row = {"prompt": "q", "completion": "a", "label": False}
    with pytest.raises(BadRows, match="not_a_pair.*task='kto'"):
        build_preference_dataset([row], byte_tokenizer(), CHATML)
