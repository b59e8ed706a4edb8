import json

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often

from ftdata import check_template
from ftdata.errors import BadRow, TemplateRefused, UsageError
from ftdata.pipeline.recipe import make_recipe
from ftdata.templates import Template, check_can_train, find_template, render_in_worker, templates
from ftdata.templates.attribution.tracked_strings import TrackedString, concat_tracked, dump_tracked_json, mark_safe
from ftdata.testing import conversation_strategy, text_strategy
from ftdata.types import Conversation

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def bound(spec, **options):
    return Template(*find_template(spec), special_tokens=SPECIAL, **options)


def owners(text):
    return [owner for length, owner in text.runs for _ in range(length)]


def mine(text, owner=9):
    """Return a tracked string in which each character has a different owner."""
    return TrackedString(text, [(1, owner + index) for index in range(len(text))])


def expected(source, result):
    """Return whether every owned character of the result equals the character of the source it is attributed to."""
    return all(
        owner == 0 or source[owner - 9].casefold() == char.casefold()
        for char, owner in zip(result, owners(TrackedString.from_str(result)), strict=True)
    )


OPERATIONS = {
    "strip": lambda s: s.strip(),
    "lstrip": lambda s: s.lstrip(" \n"),
    "rstrip": lambda s: s.rstrip("ab"),
    "slice": lambda s: s[1:-1],
    "step": lambda s: s[::-2],
    "split": lambda s: "|".join(map(str, s.split())),
    "split_on": lambda s: TrackedString.from_str("|").join(s.split("ab")),
    "rsplit_on": lambda s: TrackedString.from_str("|").join(s.rsplit("a", 1)),
    "lines": lambda s: TrackedString.from_str("|").join(s.splitlines()),
    "keep_lines": lambda s: TrackedString.from_str("").join(s.splitlines(True)),
    "partition": lambda s: concat_tracked(s.partition("b")),
    "rpartition": lambda s: concat_tracked(s.rpartition("b")),
    "replace": lambda s: s.replace("a", "xy"),
    "replace_once": lambda s: s.replace("b", "", 1),
    "prefix": lambda s: s.removeprefix("a"),
    "suffix": lambda s: s.removesuffix("b"),
    "add": lambda s: "x" + s + "y",
    "times": lambda s: s * 2,
    "iterate": lambda s: concat_tracked(s),
    "negative": lambda s: s[-1] if s else s,
    "upper": lambda s: s.upper(),
    "lower": lambda s: s.lower(),
    "title": lambda s: s.title(),
    "capitalize": lambda s: s.capitalize(),
    "safe": lambda s: str(mark_safe(s)),
    "format": lambda s: f"{s}!",
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(text=st.text(st.sampled_from("ab \n\rx"), max_size=12))
def test_tracked_strings_equal_str_and_keep_owners(name, text):
    operation = OPERATIONS[name]
    plain, kept = operation(_joinable(text)), operation(mine(text))
    assert str.__str__(plain) == str.__str__(kept)
    assert sum(length for length, _ in TrackedString.from_str(kept).runs) == len(kept)
    assert expected(text, kept)


def _joinable(text):
    return TrackedString.from_str(text)


@given(
    text=st.text(st.sampled_from("ab \n\rx"), max_size=12),
    sep=st.sampled_from(["a", "ab", "ba", "aa", " "]),
    times=st.integers(-1, 2),
)
def test_split_keeps_owners_of_ambiguous_pieces(text, sep, times):
    source = mine(text)
    at = 0
    for piece in source.split(sep, times):
        assert owners(piece) == [9 + at + i for i in range(len(piece))]
        at += len(piece) + len(sep)


@given(
    value=st.recursive(
        text_strategy(min_size=0) | st.integers() | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text_strategy(), inner, max_size=3),
    ),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 2]),
    sort_keys=st.booleans(),
    keys=st.booleans(),
)
def test_tracked_json_equals_json_dumps(value, ascii_only, indent, sort_keys, keys):
    def plain(x, **more):
        return json.dumps(x, ensure_ascii=ascii_only, indent=indent, **more)

    def track(x):
        if isinstance(x, str):
            return TrackedString(x, [(len(x), 7)] if x else [])
        if isinstance(x, dict):
            return {track(key) if keys else key: track(inner) for key, inner in x.items()}
        return [track(inner) for inner in x] if isinstance(x, list) else x

    assert dump_tracked_json(track(value), plain, sort_keys=sort_keys) == plain(value, sort_keys=sort_keys)


def test_tracked_json_assigns_escapes_to_their_owner():
    text = dump_tracked_json({"k": TrackedString('a"\n', [(3, 7)])}, json.dumps)
    assert text == '{"k": "a\\"\\n"}'
    assert text.runs == ((7, 0), (5, 7), (2, 0))


def test_tracked_json_assigns_a_whole_value_to_its_single_owner():
    own = {TrackedString("n", [(1, 7)]): 12, TrackedString("on", [(2, 7)]): True}
    text = dump_tracked_json({"name": TrackedString("f", [(1, 7)]), "arguments": own}, json.dumps)
    assert text == '{"name": "f", "arguments": {"n": 12, "on": true}}'
    assert "".join(char for char, owner in zip(text, owners(text), strict=True) if owner) == 'f{"n": 12, "on": true}'


def transformers_environment():
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda x, **k: json.dumps(x, ensure_ascii=False)
    return environment


TRICKY = [
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim + eos_token }}{% endfor %}",
    "{% for m in messages %}{{ m.role ~ ':' ~ m.content.strip() ~ '\n' }}{% endfor %}",
    "{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all + m.content %}{% endfor %}{{ ns.all }}",
    "{{ messages | map(attribute='content') | join('|') }}",
    "{% macro say(m) %}[{{ m.content }}]{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
    "{{ messages | tojson }}",
    "{% for m in messages %}{{ m.content.split('a')[-1] }}{{ m.content[:3] }}{{ m.content | replace('\n', ' ') }}{% endfor %}",
    "{% for m in messages %}{% set c = m.content %}{% if 'x' in c %}{{ c.upper() }}{% else %}{{ c | length }}{{ c }}{% endif %}{% endfor %}",
    "{% filter trim %}{% for m in messages %} {{ m.content }} {% endfor %}{% endfilter %}",
    "{% for m in messages %}{% set x %}{{ m.content }}!{% endset %}{{ x }}{{ '-'.join([x, m.role]) }}{% endfor %}",
    "{% for m in messages %}{{ '%s: %s' % (m.role, m.content) }}{{ '{}'.format(m.content) }}{{ m.content.title() }}{% endfor %}",
    "{% for c in messages[0].content %}{{ loop.index }}{{ c }}{% endfor %}{{ messages[0].nothing }}{{ messages[0].content.runs }}",
]


@often(100)
@given(messages=conversation_strategy(max_turns=2))
def test_attribution_does_not_change_the_text(messages):
    """The tracked rendering equals that of plain Jinja."""
    from ftdata.templates.attribution.spans import track_messages

    for source in TRICKY:
        template = Template("t", source, strict=False, special_tokens=SPECIAL)
        ours = template.render({"messages": track_messages(messages)})
        theirs = transformers_environment().from_string(source).render(messages=messages, **SPECIAL)
        assert ours == theirs, source
        assert sum(length for length, _ in ours.runs) == len(ours), source


@pytest.mark.parametrize("name", ["chatml", "zephyr", "gemma"])
@given(messages=conversation_strategy(system=False))
def test_built_in_chat_templates_train_answers_and_stop_tokens(name, messages):
    (rendered,) = render_in_worker(Conversation(tuple(messages)), bound(name))
    stop = {"chatml": "<|im_end|>", "zephyr": "</s>", "gemma": "<end_of_turn>"}[name]
    trained = "".join(rendered.text[s.start : s.end] for s in rendered.spans if s.generated)
    assert trained == "".join(m["content"] + stop for m in messages if m["role"] == "assistant")
    assert rendered.text.endswith(messages[-1]["content"] + stop + "\n")


@given(instruction=text_strategy(), extra=text_strategy(min_size=0), answer=text_strategy())
def test_prompt_templates_train_the_response(instruction, extra, answer):
    fields = {"instruction": instruction, "input": extra, "output": answer}
    messages = ({"role": "user", "content": instruction}, {"role": "assistant", "content": answer})
    row = Conversation(messages, fields, completion_from=1)
    (rendered,) = render_in_worker(row, bound("alpaca"))
    trained = "".join(rendered.text[s.start : s.end] for s in rendered.spans if s.generated)
    assert trained == answer + "</s>"
    assert rendered.text.endswith(trained)
    assert rendered.add_bos


def test_instruction_response_template_format():
    row = Conversation((), {"instruction": "Add 1 and 2", "output": "3", "input": ""}, completion_from=1)
    (rendered,) = render_in_worker(row, bound("instruction_response"))
    assert rendered.text == "### Instruction:\nAdd 1 and 2\n\n### Response:\n3</s>"
    assert [rendered.text[s.start : s.end] for s in rendered.spans if s.generated] == ["3", "</s>"]


def test_column_without_a_place_in_the_template_is_rejected():
    row = Conversation((), {"instruction": "x", "output": "y", "input": "z"}, completion_from=1)
    with pytest.raises(BadRow, match="message_dropped"):
        render_in_worker(row, bound("instruction_response"))


def test_undefined_name_is_an_error():
    with pytest.raises(BadRow, match="'outptu' is undefined"):
        render_in_worker(Conversation((), {"output": "y"}), bound("{% generation %}{{ outptu }}{% endgeneration %}"))


def test_prompt_template_without_generation_tags_is_refused():
    with pytest.raises(TemplateRefused, match="nothing_marked"):
        check_can_train(bound("{{ instruction }} {{ output }}"))


def test_syntax_error_names_its_line():
    with pytest.raises(TemplateRefused, match="line 2"):
        check_can_train(bound("{{ a }}\n{% if %}"))


def test_unknown_template_suggests_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean 'chatml'"):
        find_template("chatlm")


def test_mistyped_template_file_is_not_searched_on_the_hub(tmp_path):
    (tmp_path / "mine.jinja").write_text("")
    with pytest.raises(UsageError, match="unknown_template.*did you mean '.*mine.jinja'"):
        check_template(tmp_path / "min.jinja")


def test_templates_are_found_in_files_and_strings(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% generation %}{{ text }}{% endgeneration %}")
    assert find_template(path) == (str(path), path.read_text())
    assert find_template("{{ x }}") == ("<string>", "{{ x }}")
    assert set(templates.names()) >= {"alpaca", "question_answer", "instruction_response", "chatml"}


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__ }}",
        "{{ messages[0].content.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
        "{{ namespace(_x=1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_sandbox_blocks_attacks(attack):
    program = Template("attack", attack + "{% generation %}{{ messages[0].content }}{% endgeneration %}")
    conversation = Conversation(({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}))
    try:
        (rendered,) = render_in_worker(conversation, program)
    except (BadRow, TemplateRefused):
        return
    assert "class" not in rendered.text
    assert "root" not in rendered.text


def test_formatted_text_gets_no_second_eos():
    row = Conversation((), text="<s>[INST] a [/INST] b </s>")
    (rendered,) = render_in_worker(row, Template("none", "", special_tokens=SPECIAL))
    assert rendered.text == row.text
    assert not rendered.add_bos
    (plain,) = render_in_worker(Conversation((), text="just text"), Template("none", "", special_tokens=SPECIAL))
    assert plain.text == "just text</s>"
    assert plain.add_bos
    assert plain.flags == {"eos_appended"}
    padding = {**SPECIAL, "pad_token": "<|endoftext|>"}
    (ended,) = render_in_worker(Conversation((), text="a<|endoftext|>"), Template("none", "", special_tokens=padding))
    assert ended.text == "a<|endoftext|>"


def test_missing_template_error_suggests_a_template():
    conversation = Conversation(({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}))
    with pytest.raises(TemplateRefused, match="chatml"):
        render_in_worker(conversation, Template("none", ""))


def test_dropped_message_is_rejected_and_named():
    source = (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = (
        {"role": "system", "content": "x"},
        {"role": "user", "content": "y"},
        {"role": "assistant", "content": "z"},
    )
    with pytest.raises(BadRow, match="message_dropped") as caught:
        render_in_worker(Conversation(messages), Template("t", source, strict=False, special_tokens=SPECIAL))
    assert caught.value.field == "messages[0].content"


def test_turns_of_templates_without_generation_tags_are_detected():
    detected = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = (
        {"role": "user", "content": "y"},
        {"role": "assistant", "content": "z"},
        {"role": "user", "content": "w"},
    )
    (rendered,) = render_in_worker(
        Conversation(messages), Template("t", detected, strict=False, special_tokens=SPECIAL)
    )
    assert [rendered.text[s.start : s.end] for s in rendered.spans if s.generated] == ["z", "</s>"]
    unstoppable = detected.replace("{{ eos_token }}", "")
    (rendered,) = render_in_worker(
        Conversation(messages), Template("t", unstoppable, strict=False, special_tokens=SPECIAL)
    )
    assert [rendered.text[s.start : s.end] for s in rendered.spans if s.generated] == ["z"]
    assert "no_trained_stop" in rendered.flags


def test_jinja_is_new_enough():
    assert tuple(map(int, jinja2.__version__.split(".")[:3])) >= (3, 1, 6)


@pytest.mark.parametrize("source", ["{{ messages }}{# x", "{% raw %}{{ messages }}", "{{ messages", "{% if %}"])
def test_syntax_errors_are_refused(source):
    with pytest.raises(TemplateRefused, match="template_syntax"):
        check_template(source)


@pytest.mark.parametrize("wrong", ["m.content | rerlace('a', 'b')", "m is oddly"])
def test_unknown_filters_and_tests_are_named_with_their_line(tokenizer_dir, wrong):
    source = "{% for m in messages %}\n{{ " + wrong + " }}{% endfor %}"
    with pytest.raises(TemplateRefused, match=r"template_syntax.*line 2: No (filter|test) named"):
        make_recipe(tokenizer_dir("tiny_bpe"), source)


@pytest.mark.parametrize(
    ("message", "said", "hint"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "no", "join the text parts"),
        ({"content": "a", "tool_calls": [{"id": "call_1", "function": {"name": "f"}}]}, "bad id", "remove the ids"),
        ({"content": "a", "tool_calls": [{"id": "call_1", "function": {"name": "f"}}]}, "no", "may not support"),
        ({"content": "a"}, "no", "correct the row, or use a template that accepts it"),
    ],
)
def test_errors_of_templates_have_a_fix(message, said, hint):
    template = bound("{{ messages[0].content }}{{ raise_exception('" + said + "') }}")
    messages = ({"role": "user", "content": "q"}, {"role": "assistant", **message})
    with pytest.raises(BadRow, match=f"template_raises.*{hint}"):
        render_in_worker(Conversation(messages=messages), template)
