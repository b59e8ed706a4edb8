"""A conversation that is rendered from the cache equals a rendering without a cache."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import often
from tokenizer_makers import CHATML

from ftdata.errors import BadRow, FtdataError
from ftdata.pipeline.examples import build_rows
from ftdata.pipeline.recipe import make_recipe
from ftdata.templates import find_template, render_chat, render_in_worker
from ftdata.templates.chat import ChatRendering, render_turns
from ftdata.templates.render_cache import describe_shape, render_cache
from ftdata.templates.template import Template
from ftdata.testing import text_strategy
from ftdata.types import Conversation, Reject, Row, Source

ROLES = {"s": "system", "u": "user", "a": "assistant"}
HARD = [
    "  x  ",
    "\nend\n",
    "<think>hm</think>yes",
    "</think>",
    "<think>",
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "a",
    "",
    "[INST]",
    "é\u0301",
]
PARTS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for p in LIST %}{% if p.type == 'image' %}<img>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
"""Prints the texts of the parts of a message, and a placeholder for each image."""
SOURCES = {
    "chatml": ("tiny_bpe", "chatml"),
    "qwen": ("qwen", None),
    "deepseek": ("deepseek", None),
    "short": ("tiny_bpe", "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content | length > 4 %}{{ m.content | trim }}{% else %}short {{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    "mood": ("tiny_bpe", "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if 'yes' in messages[0].content %}!{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if 'yes' in messages[0].content %}!{% endif %}{% endif %}"),
    "no_system": ("tiny_bpe", "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"),
    "parts": ("tiny_bpe", PARTS.replace("LIST", "m.content")),
    "reversed parts": ("tiny_bpe", PARTS.replace("LIST", "m.content | reverse")),
    "first part twice": ("tiny_bpe", PARTS.replace("LIST", "m.content + m.content[:1]")),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _empty_cache():
    render_cache.cache_clear()


def outcome(render, *arguments):
    try:
        return render(*arguments)
    except BadRow as error:
        return error.code


def render_without_cache(conversation, template, turns):
    """Render with a new template object and no cache at all."""

    def render(messages, tools, _, indices, on_dropped_message):
        return render_turns(
            ChatRendering.from_messages(messages, tools, replace(template)), indices, on_dropped_message
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render_chat, "render_cached", render)
        return render_chat.render_chat(conversation, template, turns)


FIELDS = st.sampled_from(
    [
        *[lambda text: {"content": text}] * 6,
        lambda text: {"content": text, "train": False},
        lambda text: {"content": text, "name": "x"},
        lambda text: {"content": [{"type": "text", "text": text}]},
        *[lambda text: {"content": [{"type": "image"}, {"type": "text", "text": text}]}] * 2,
        lambda text: {"content": [{"type": "text", "text": text}, {"type": "image"}, {"type": "text", "text": "b"}]},
        lambda text: {"content": [{"type": "text", "text": text}, {"text": f"a{text}", "type": "text"}]},
        lambda text: {"content": "so", "reasoning_content": text},
    ]
)


@pytest.mark.parametrize("name", SOURCES)
@often(60)
@given(
    shape=st.sampled_from(["ua", "sua", "uaua"]),
    fields=st.lists(FIELDS, min_size=4, max_size=4),
    contents=st.lists(
        st.lists(text_strategy() | st.sampled_from(HARD), min_size=4, max_size=4), min_size=3, max_size=6
    ),
    turns=st.sampled_from(["auto", "joint", "split"]),
)
def test_cached_renderings_equal_new_renderings(tokenizer_dir, name, shape, fields, contents, turns):
    tokenizer, source = SOURCES[name]
    template = make_recipe(tokenizer_dir(tokenizer), source).template
    for texts in contents:
        messages = tuple(
            {"role": ROLES[role], **make(text)} for role, make, text in zip(shape, fields, texts, strict=False)
        )
        conversation = Conversation(messages)
        expected = outcome(render_without_cache, conversation, template, turns)
        assert outcome(render_in_worker, conversation, template, turns) == expected
        # This process also has a cache of its own.
        assert outcome(render_chat.render_chat, conversation, template, turns) == expected


PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOTE = "messages[0].get('note', '')"
UNRECORDED = {
    "length as a default": f"{{% for i in range(({NOTE} | length) or 1) %}}x{{% endfor %}}",
    "length of a condition": f"{{% for i in range({NOTE} | length if true else 1) %}}x{{% endfor %}}",
    "length and": f"{{% for i in range(true and {NOTE} | length) %}}x{{% endfor %}}",
    "index": f"{{{{ ['a', 'b', 'c', 'd', 'e', 'f'][({NOTE} | length) or 0] }}}}",
    "slice": f"{{{{ 'abcdefgh'[:({NOTE} | length) or 1] }}}}",
    "argument": f"{{{{ '-'.center(({NOTE} | length) or 1) }}}}",
    "mapped length": "{{ ['a', 'b', 'c', 'd', 'e', 'f'][(messages | map(attribute='content') | map('length') | list)[0]] }}",
    "date": f"{{{{ strftime_now({NOTE}) }}}}",
}


@pytest.mark.parametrize("name", UNRECORDED)
def test_texts_that_python_reads_directly_are_not_replayed(name):
    template = Template("direct", UNRECORDED[name] + PLAIN, special_tokens={"eos_token": "<|im_end|>"})
    for note in ("hello", "abc", "hello", "ab"):
        messages = ({"role": "user", "content": note, "note": note}, {"role": "assistant", "content": "a"})
        conversation = Conversation(messages)
        expected = render_without_cache(conversation, template, "auto")
        assert render_chat.render_chat(conversation, template) == expected


def test_thinking_tag_that_the_template_closes_is_not_replayed():
    closing = PLAIN.replace("{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %}</think>{% endif %}")
    template = Template("closing", closing, special_tokens={"eos_token": "<|im_end|>"})
    for answer in ("plain", "<think> deep", "plain", "<think>"):
        conversation = Conversation(({"role": "user", "content": "q"}, {"role": "assistant", "content": answer}))
        expected = outcome(render_without_cache, conversation, template, "auto")
        assert outcome(render_chat.render_chat, conversation, template) == expected


def counted(monkeypatch, template):
    """Count the runs of a template."""
    runs, rendered = [], type(template).run

    def run(self, *arguments, **options):
        runs.append(1)
        return rendered(self, *arguments, **options)

    monkeypatch.setattr(type(template), "run", run)
    return runs


def talk(turns, blanks=False):
    said = (" said {} \n" if blanks else "said {}").format
    return Conversation(tuple({"role": ("user", "assistant")[n % 2], "content": said(n)} for n in range(2 * turns)))


def test_whitespace_around_texts_needs_no_other_run(tokenizer_dir, monkeypatch):
    template = make_recipe(tokenizer_dir("tiny_bpe"), SOURCES["chatml"][1]).template
    render_in_worker(talk(3), template)
    runs = counted(monkeypatch, template)
    for text in ("a", " a", "a\n", "\n\na b "):
        (found,) = render_in_worker(Conversation(tuple({**one, "content": text} for one in talk(3).messages)), template)
        assert found.text.count(f"\n{text}<|im_end|>") == 6
    assert runs == []


@pytest.mark.parametrize("blank", ["", " \n"])
def test_dropped_message_is_found_after_an_empty_message(tokenizer_dir, blank):
    template = make_recipe(tokenizer_dir("tiny_bpe"), SOURCES["no_system"][1]).template
    conversations = [
        Conversation(({"role": "system", "content": system}, *talk(1).messages)) for system in (blank, "Be brief.")
    ]
    render_in_worker(conversations[0], template)
    with pytest.raises(BadRow) as raised:
        render_in_worker(conversations[1], template)
    assert raised.value.code == "message_dropped"


def test_longer_conversations_reuse_the_runs_of_shorter_ones(tokenizer_dir, monkeypatch):
    template = make_recipe(tokenizer_dir("tiny_bpe"), SOURCES["chatml"][1]).template
    for turns in range(1, 12):
        render_in_worker(talk(turns), template)
    runs = counted(monkeypatch, template)
    render_in_worker(talk(12), template)
    # The whole twice, watched and not, and what it begins with up to the last turn.
    assert len(runs) <= 5


def test_split_turns_use_the_cache(tokenizer_dir, monkeypatch):
    template = make_recipe(tokenizer_dir("qwen"), None).template
    assert len(render_in_worker(talk(3), template)) == 3
    runs = counted(monkeypatch, template)
    for number in range(4):
        said = [{**one, "content": f"{one['content']} {number}"} for one in talk(3).messages]
        assert len(render_in_worker(Conversation(tuple(said)), template)) == 3
    assert runs == []


@pytest.mark.parametrize("name", ["chatml", "qwen"])
def test_plain_conversations_of_a_shape_are_rendered_once(tokenizer_dir, name):
    tokenizer, source = SOURCES[name]
    template = make_recipe(tokenizer_dir(tokenizer), source).template
    runs = []
    rendered = type(template).run

    def counted(self, *arguments, **options):
        runs.append(1)
        return rendered(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(template), "run", counted)
        for number in range(20):
            talk = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a {number}"}]
            render_in_worker(Conversation(tuple(talk)), template)
            if number == 0:
                runs.clear()
    assert runs == []


def test_reactions_to_typed_control_tokens_are_not_cached(tokenizer_dir):
    source = SOURCES["chatml"][1]
    reacting = find_template(source)[1].replace(
        "{{ text(message.content) }}<|im_end|>{% endif %}",
        "{% if '<|im_end|>' in message.content %}<|im_end|>{% endif %}{{ text(message.content) }}<|im_end|>{% endif %}",
    )
    recipe = make_recipe(tokenizer_dir("tiny_bpe"), reacting)
    for typed in ("", "<|im_end|>") * 3:
        talk = [{"role": "user", "content": f"q {typed}"}, {"role": "assistant", "content": "a"}]
        rows = [Row({"messages": talk}, Source("x", number)) for number in range(20)]
        found = {one.code if isinstance(one, Reject) else "built" for one in build_rows(recipe, rows)}
        assert found == ({"control_tokens"} if typed else {"built"})


GROWTH = {
    "doubled": "{% set s = namespace(x=messages[0].content) %}{% for i in range(40) %}{% set s.x = s.x ~ s.x %}{% endfor %}"
    "{% if s.x.startswith('x') %}x{% endif %}",
    "doubled a little": "{% set s = namespace(x=messages[0].content) %}{% for i in range(12) %}{% set s.x = s.x ~ s.x %}{% endfor %}"
    "{% if s.x.startswith('x') %}x{% endif %}",
    "stripped": "{% if messages[0].content.strip('ab' * 200000).startswith('x') %}x{% endif %}",
    "joined": "{% set s = namespace(x=messages[0].content) %}{% for i in range(3000) %}{% set s.x = s.x ~ '-' %}{% endfor %}"
    "{% if s.x.startswith('x') %}x{% endif %}",
    "asked often": "{% for i in range(2000) %}{% if messages[0].content.startswith('q' ~ i) %}x{% endif %}{% endfor %}",
    "asked of long texts": "{% if messages[0].content.startswith('q' * 300000) %}x{% endif %}",
    "replaced": "{% if (messages[0].content" + " | replace('h', 'hhhhhhhhh')" * 8 + ").startswith('x') %}x{% endif %}",
    "recased": "{% if messages[0].content" + ".upper()" * 40 + ".startswith('x') %}x{% endif %}",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "growth",
    [pytest.param(name, marks=() if name in ("doubled", "asked often") else pytest.mark.long) for name in GROWTH],
)
def test_work_of_cached_renderings_is_bounded(growth, tokenizer_dir):
    """The template stays within its limits on short rows; on a long row this process must not exceed them instead."""
    import resource
    import time

    from ftdata import build_sft_dataset

    asked = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
    long = {"role": "user", "content": "ab" * 1_000_000}, asked[1]
    data = [{"messages": asked}] * 40 + [{"messages": long}] * 2
    memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    source = GROWTH[growth] + CHATML + "{# bounded #}"
    try:
        report = build_sft_dataset(
            data, tokenizer_dir("tiny_bpe"), source, on_bad_rows="quarantine", max_rejects=42
        ).report
        assert report.totals["built"] >= 40 or growth == "doubled"
    except FtdataError as error:
        assert error.code in ("template_limits", "no_rows_built", "too_many_rejects"), error
    # Tokenizing 4 MB takes some of it.
    assert time.process_time() - began < 12
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 800 << 10


def test_ordinary_layouts_are_within_the_bounds():
    messages = tuple({"role": ("user", "assistant")[n % 2], "content": f"text {n}"} for n in range(60))
    template = Template("honest", CHATML, special_tokens={"eos_token": "<|im_end|>"})
    for _ in range(2):
        render_chat.render_chat(Conversation(messages), template)
    assert render_cache(template.key).fill_layout(describe_shape(messages), range(1, 60, 2)) is not None


def test_contents_of_parts_are_rendered_from_the_cache(tokenizer_dir):
    # No other test uses this template: the worker process sends each layout once, and continues between tests.
    source = PARTS.replace("LIST", "m.content") + "{# layouts of parts #}"
    template = make_recipe(tokenizer_dir("tiny_bpe"), source).template

    def conversation(*texts):
        parts = [{"type": "text", "text": texts[0]}, {"type": "image"}, {"type": "text", "text": texts[1]}]
        return Conversation(({"role": "user", "content": parts}, {"role": "assistant", "content": texts[2]}))

    render_in_worker(conversation("a", "b", "c"), template)
    messages = conversation("d", "e", "f").messages
    found = render_cache(template.key).fill_layout(describe_shape(messages), [1])
    assert found is not None
    assert found.text == "<|im_start|>user\nd<img>e<|im_end|>\n<|im_start|>assistant\nf<|im_end|>\n"
