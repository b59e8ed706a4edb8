"""Templates are untrusted code: on any row they stop soon, and they change nothing in this process.

G14: at most 5 s and 512 MB for each template, and the process stays usable.
"""

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest

from ftdata import build_sft_dataset, check_template, preview
from ftdata.errors import FtdataError, StorageError
from ftdata.templates.worker import process

MEGABYTES = 512
# Beside other tests, everything takes longer.
SECONDS = 15.0 if "PYTEST_XDIST_WORKER" in os.environ else 5.0
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATION = {
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}],
    "fields": {},
    "tools": [],
    "text": None,
    "completion_from": 1,
}
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

# `n` is what no constant folding knows.
BOMBS = {
    "loops": LOOPS,
    "power": "{% set x = 9 ** (9 ** (n + 7)) %}",
    "product": "{% set a = 3 ** (n * 20000000) %}{% set b = a * a %}",
    "search": "{% set x = ('a' * (n * 10000000)).rfind('ab' ~ 'a' * (n * 5000000)) %}",
    "comparison": "{% set s = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set s.a = [s.a, s.a] %}"
    "{% set s.b = [s.b, s.b] %}{% endfor %}{% if s.a == s.b %}{% endif %}",
    "hash": "{% set s = namespace(t=(1,)) %}{% for i in range(60) %}{% set s.t = (s.t, s.t) %}{% endfor %}{% set d = {s.t: 1} %}",
    "printed": "{% set s = namespace(a=[1]) %}{% for i in range(60) %}{% set s.a = [s.a, s.a] %}{% endfor %}{{ s.a | string | length }}",
    "json": "{% set s = namespace(a=[1]) %}{% for i in range(60) %}{% set s.a = [s.a, s.a] %}{% endfor %}{{ s.a | tojson }}",
    "sort": "{% for i in range(9999) %}{% set x = range(99999) | sort(reverse=true) %}{% endfor %}",
    "slices": "{% for x in [1] | slice(2000000000) %}{% endfor %}",
    "tags": "{% set x = ('<a>' * (n * 3000000)) | striptags %}",
    "macros": "{% macro f(k) %}{% if k %}{{ f(k - 1) }}{{ f(k - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% for m in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "text": "{% set x = 'A' * (n * 2000000000) %}",
    "list": "{% set x = [0] * (n * 300000000) %}",
    "centred": "{% set x = 'x' | center(n * 2000000000) %}",
    "justified": "{% set x = 'x'.ljust(n * 2000000000) %}",
    "format": "{% set x = '{:>4000000000}'.format(n) %}",
    "percent": "{% set x = '%*d' % (n * 1000000000, 1) %}",
    "tabs": "{% set x = ('\\t' * n).expandtabs(1000000000) %}",
    "indented": "{{ messages | tojson(indent=1000000000 * n) }}",
    "batches": "{% set x = [1] | batch(1000000000, 'x') | list %}",
    "doubled": "{% set s = namespace(x='A' * 1024) %}{% for i in range(40) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
    "replaced": "{% set x = ('a' * 100000 * n) | replace('a', 'b' * 100000) %}",
    "too much at once": "{% set x = 'A' * (n * 2 ** 61) %}",
    "output": "{% for i in range(99999) %}{{ 'A' * 30000 }}{% endfor %}",
    "some output": "{% for i in range(9999) %}{{ 'A' * 30000 }}{% endfor %}",
    "message": "{{ raise_exception('A' * (200000000 * n)) }}",
    "pieces": "{% for i in range(99999) %}{% for j in range(20) %}{{ messages[0].content[0] }}-{% endfor %}{% endfor %}",
    "blocks": "{% for i in range(20000) %}{% generation %}{{ n }}{% endgeneration %}{% endfor %}",
}
ON_A_ROW = "{% if 'detonate' in messages[0].content %}{% set n = messages | length %}BOMB{% endif %}" + CHAT
# Where templates are only asked for prompts, only compiled, or have no messages.
FORMS = {
    "on a row": ON_A_ROW,
    "for a prompt": "{% if add_generation_prompt and messages | length > 4 %}{% set n = 2 %}BOMB{% endif %}" + CHAT,
    "never run": "{% if messages | length > 99 %}{% set n = 2 %}BOMB{% endif %}" + CHAT,
    "at once": "{% set n = 2 %}BOMB" + CHAT,
    "of columns": "{% set n = 2 %}{% set messages = [{'content': 'x'}] %}BOMB{{ instruction }}{% generation %}{{ output }}<|im_end|>{% endgeneration %}",
}
FEW = {"on a row": ("loops", "text"), "of columns": ("loops",), "at once": ("doubled",)}
CASES = [
    pytest.param(form, bomb, marks=[] if bomb in FEW.get(form, ()) else pytest.mark.long)
    for form in FORMS
    for bomb in BOMBS
    if form != "of columns" or bomb != "blocks"
]
ESCAPES = {
    "format": "'{0.__globals__[os].environ[SECRET]}'.format(range)",
    "format of a result": "('{0.__init__.__globals__[os].environ[SECRET]}' ~ '').format(joiner)",
    "format_map": "'{x.__init__.__globals__[os].environ[SECRET]}'.format_map({'x': joiner})",
    "the row's own": "'{0.strip.__globals__[os].environ[SECRET]}'.format(messages[0].content)",
    "attribute": "messages[0].content.strip.__globals__",
    "class": "messages[0].content.__class__.__mro__",
    "getattribute": "''.__getattribute__('__class__')",
    "reduce": "('x' ~ 'y').__reduce_ex__(2)",
    "filter": "messages[0].content | attr('__class__')",
    "mapped": "[messages[0].content] | map(attribute='__class__') | list",
    "stored": "[''.format][0].__self__",
    "passed on": "('{0.__class__}' | string).format(1)",
}


def rows(form):
    if form == "of columns":
        return [{"instruction": "add two", "output": "four"}] * 3
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    odd = [{"role": "user", "content": "detonate"}, {"role": "assistant", "content": "no"}] * 3
    return [{"messages": talk}, {"messages": odd}, {"messages": talk * 2}]


def assert_stops_soon(template, data, tokenizer):
    """Build, preview and check; assert that each ends soon, with a result or a clear error."""
    for do in (
        lambda: build_sft_dataset(data, tokenizer, template, on_bad_rows="quarantine", max_rejects=2),
        lambda: check_template(template),
        lambda: preview(data, template=template),
    ):
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            do()
        except FtdataError as error:
            assert error.exit_code in (3, 4), error
            assert len(str(error)) < 20_000
        assert time.monotonic() - began < SECONDS
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES << 10
    assert len(build_sft_dataset(rows("plain"), tokenizer, CHAT)["train"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("form", "bomb"), CASES)
def test_template_bombs_are_stopped(form, bomb, tokenizer_dir, monkeypatch, request):
    if not request.node.get_closest_marker("long"):
        # Waiting for the limit takes most of the time; the long tests use the real limit.
        monkeypatch.setattr(process, "CPU_SECONDS", 0.2)
    assert_stops_soon(FORMS[form].replace("BOMB", BOMBS[bomb]), rows(form), tokenizer_dir("tiny_bpe"))


@pytest.mark.parametrize("escape", ESCAPES)
def test_sandbox_cannot_be_escaped(escape, tokenizer_dir, monkeypatch):
    monkeypatch.setenv("SECRET", "swordfish")
    for printed in ("{{ X }}", "{{ raise_exception(X | string) }}", "{% if add_generation_prompt %}{{ X }}{% endif %}"):
        source = printed.replace("X", f"({ESCAPES[escape]})") + CHAT
        said = ""
        try:
            found = build_sft_dataset(rows("on a row"), tokenizer_dir("tiny_bpe"), source)
            said = str(found["train"][:]) + str(found.report)
        except FtdataError as error:
            said = str(error)
        for told in ("swordfish", "<class", "copyreg", "0x"):
            assert told not in said


@pytest.mark.shared
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_shared_hostile_templates_are_stopped(shared, tokenizer_dir):
    known = json.loads((shared / "badinput" / "dev" / "templates" / "templates.json").read_text())
    assert len(known) == 19
    for template in known.values():
        source = template if isinstance(template, str) else template["template"]
        for form in (
            source,
            source + CHAT,
            source + "{{ instruction }}{% generation %}{{ output }}{% endgeneration %}",
        ):
            assert_stops_soon(form, rows("of columns" if "instruction" in form else "plain"), tokenizer_dir("tiny_bpe"))


def test_one_slow_row_is_one_reject(tokenizer_dir):
    """A row that makes an ordinary template too slow is rejected; the other rows are built."""
    source = ON_A_ROW.replace("BOMB", LOOPS) + "{# honest #}"
    found = build_sft_dataset(
        rows("on a row"), tokenizer_dir("tiny_bpe"), source, on_bad_rows="quarantine", max_rejects=1
    )
    assert found.report.totals["built"] == 2
    assert "template_limits" in found.report.rejects[0]
    assert "<memory>[1]" in found.report.rejects[0]


def test_random_functions_are_removed(tokenizer_dir):
    for source in ("{{ lipsum() }}", "{{ [1, 2] | random }}", "{{ lipsum }}"):
        with pytest.raises(FtdataError):
            build_sft_dataset(rows("on a row"), tokenizer_dir("tiny_bpe"), source + CHAT)


@pytest.mark.slow
def test_killed_template_worker_is_replaced(tokenizer_dir):
    from ftdata.templates.worker import process

    data = [
        {"messages": [*row["messages"][:-1], {**row["messages"][-1], "name": f"x{n}"}]}
        for n, row in enumerate(rows("") * 20)
    ]
    whole = build_sft_dataset(data, tokenizer_dir("tiny_bpe"), CHAT)["train"][:]
    worker = process._get_worker()
    send, sent = process._Worker.send, []

    def killing(self, request, **how):
        sent.append(request)
        if len(sent) % 7 == 0:
            self.process.kill()
        send(self, request, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process._Worker, "send", killing)
        assert build_sft_dataset(data, tokenizer_dir("tiny_bpe"), CHAT)["train"][:] == whole
    assert len(sent) > 20
    assert worker.process.poll() is not None
    assert build_sft_dataset(data, tokenizer_dir("tiny_bpe"), CHAT)["train"][:] == whole


def test_repeatedly_killed_template_worker_stops_the_build(tokenizer_dir):
    """If something other than the template kills the worker, no row may be rejected."""
    send = process._Worker.send

    def killing(self, request, **how):
        self.process.kill()
        send(self, request, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process._Worker, "send", killing)
        with pytest.raises(StorageError, match="template_worker_lost"):
            build_sft_dataset(
                rows("")[:1], tokenizer_dir("tiny_bpe"), CHAT + "{# killed #}", on_bad_rows="quarantine", max_rejects=9
            )


@pytest.mark.slow
def test_template_worker_that_ended_before_a_request_is_replaced(tokenizer_dir):
    """The worker may end while answers to earlier requests are received, right before the next one is sent."""
    from ftdata.templates.template import Template

    looping = Template("looping", "{{ messages }}" + LOOPS)
    asked = [
        process.submit_request("render", looping, conversation=CONVERSATION, turns="auto", on_dropped_message="reject")
        for _ in range(2)
    ]
    honest = process.submit_request("scaffold", Template("honest", CHAT))
    assert "text" in honest.result()
    for request in asked:
        with pytest.raises(process.LimitExceeded):
            request.result()


def test_limits_count_cpu_time():
    """A worker that gets no CPU time must not reject its row."""
    from ftdata.templates.template import Template

    request = process.submit_request("scaffold", Template("honest", CHAT + "{# stopped #}"))
    worker = process._get_worker()
    os.kill(worker.process.pid, signal.SIGSTOP)
    threading.Timer(3 * process.CPU_SECONDS, os.kill, (worker.process.pid, signal.SIGCONT)).start()
    assert "text" in request.result()
    assert request.exceeded == 0
    assert process._get_worker() is worker


def test_plan_does_not_exceed_the_memory_limit_in_this_process(tokenizer_dir):
    """A plan repeats the string operations of the template on longer texts in this process, which has no limit."""
    asked = "messages[0].content" + " | replace('ξ', 'ξξξξξξξξξ')" * 8
    source = f"{{% if ({asked}).startswith('x') %}}x{{% endif %}}" + CHAT
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    long = [{"role": "user", "content": "ξ" * 1000}, {"role": "assistant", "content": "yes"}]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = [{"messages": talk}] * 5 + [{"messages": long}] + [{"messages": talk}] * 5
    found = build_sft_dataset(data, tokenizer_dir("tiny_bpe"), source, on_bad_rows="quarantine", max_rejects=1)
    assert found.report.totals["built"] == 10
    assert "template_limits" in found.report.rejects[0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES << 10


def test_secrets_are_not_in_the_environment_of_the_template_worker(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    process._get_worker().stop()
    place = Path(f"/proc/{process._get_worker().process.pid}/environ")
    # Until it has begun it has none.
    while not (environment := place.read_bytes()):
        time.sleep(0.01)
    assert b"PYTHONPATH" in environment
    assert b"secret" not in environment
