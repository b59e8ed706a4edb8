"""The audit compares the tokens before each trained turn with those that a server renders."""

import datetime
import json

import pytest
from serving_stand_in import make_tokenizer, stand_in
from tokenizer_makers import CHATML

from ftdata import audit
from ftdata.build.dataset import write_build
from ftdata.errors import HubError, InputRefused, UsageError
from ftdata.tokenizing.load import load_tokenizer

pytest.importorskip("transformers")

CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}]}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]
TALK = [
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "And  é\n\n?"},
    {"role": "assistant", "content": "4 <|im_end|> typed"},
]
ROWS = [
    {"messages": TALK},
    {"messages": [{"role": "system", "content": "Be brief."}, *TALK[:2]]},
    {"messages": [TALK[0], CALL, {"role": "tool", "content": "3"}, TALK[1]], "tools": TOOLS},
    {"question": "Hi?", "answer": "Yes."},
]
CONFIRMED = "the server renders the tokens of the training before every trained turn"


def findings(report):
    return [one for one in report.findings if one.code == "serving"]


@pytest.fixture(scope="module")
def qwen(tokenizer_dir):
    return tokenizer_dir("qwen")


@pytest.fixture(scope="module")
def served(qwen):
    return make_tokenizer(load_tokenizer(qwen))


@pytest.mark.parametrize("kind", ["vllm", "old vllm", "llama.cpp", "tgi"])
def test_equal_servers_have_no_findings(kind, qwen, served):
    rows = [row for row in ROWS if "<|im_end|>" not in str(row)]
    with stand_in(served, kind) as (url, requests):
        report = audit(rows, qwen, serve=f"{url}/v1/" if kind == "vllm" else url)
    assert findings(report) == []
    assert CONFIRMED in report.confirmed
    # One request per trained turn, after those that find out the kind of server; llama.cpp needs two.
    turns = 1 + 2 + 1 if kind != "llama.cpp" else 2 * (1 + 2 + 1)
    bodies = [body for _, body in requests if "What is" in str(body) or "Hi?" in str(body) or "content" in body]
    assert len(bodies) - (kind == "llama.cpp") == turns
    assert all("train" not in message for body in bodies for message in body.get("messages", ()))


def test_typed_control_tokens_are_a_difference(qwen, served):
    """The training has text where a server that does not escape control tokens reads a control token."""
    rows = [{"messages": [*TALK, {"role": "user", "content": "More?"}, {"role": "assistant", "content": "No."}]}]
    with stand_in(served) as (url, _):
        (finding,) = findings(audit(rows, qwen, serve=url))
    assert (finding.severity, finding.count) == ("error", 1)
    assert "before messages[5], token" in finding.locations[0].detail
    assert (
        "(messages[3], content): the training has ' <|im_end|> typed', and the server renders ' ⟨<|im_end|>⟩ typed"
        in finding.locations[0].detail
    )


INJECTIONS = {
    "bos": {"change_ids": lambda ids: [5, *ids]},
    "system prompt": {
        "change": lambda body: {**body, "messages": [{"role": "system", "content": "Hello."}, *body["messages"]]}
    },
    "stripped": {
        "change": lambda body: {
            **body,
            "messages": [{**one, "content": (one.get("content") or "").replace("  ", " ")} for one in body["messages"]],
        }
    },
    "no tools": {"change": lambda body: {**body, "tools": None}},
    "thinking": {"change": lambda body: {**body, "chat_template_kwargs": {"enable_thinking": False}}},
    "missing token": {"change_ids": lambda ids: ids[:-1]},
}
AFFECTED = {"bos": 6, "system prompt": 6, "stripped": 1, "no tools": 2, "thinking": 6, "missing token": 6}
"""The number of turns with a difference."""


@pytest.mark.parametrize("name", INJECTIONS)
def test_every_injected_difference_is_found(name, qwen, served):
    rows = [row for row in ROWS if "<|im_end|>" not in str(row)] + [
        {"messages": [*TALK[:2], TALK[2], {"role": "assistant", "content": "5"}]}
    ]
    with stand_in(served, **INJECTIONS[name]) as (url, _):
        report = audit(rows, qwen, serve=url)
    (finding,) = findings(report)
    assert CONFIRMED not in report.confirmed
    assert finding.count == AFFECTED[name]


def test_tool_arguments_as_text_are_found(tokenizer_dir):
    """A server that passes the text of the arguments to a template that encodes them as JSON encodes them twice."""
    tokenizer = load_tokenizer(tokenizer_dir("tiny_bpe"))
    template = CHATML.replace(
        "{{ message.content }}",
        "{{ message.content or '' }}{% for call in message.tool_calls or [] %}<call>{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}",
    )
    served = make_tokenizer(tokenizer.with_template(template, tokenizer.special_tokens))
    rows = [{"messages": ROWS[2]["messages"]}]
    for parses, count in ((True, 0), (False, 1)):
        with stand_in(served, parses=parses) as (url, _):
            found = findings(audit(rows, tokenizer, template, serve=url))
        assert len(found) == count
    assert "before messages[3]" in found[0].locations[0].detail
    assert "(messages[1], tool_call)" in found[0].locations[0].detail


def test_date_of_the_server_is_found(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir("tiny_bpe"))
    template = "{{ strftime_now('%d') }}\n" + CHATML
    with stand_in(make_tokenizer(tokenizer.with_template(template, tokenizer.special_tokens))) as (url, _):
        today = datetime.datetime.now().astimezone().date()
        other = today - datetime.timedelta(days=1)
        assert findings(audit(ROWS[3:], tokenizer, template, serve=url, date=today)) == []
        (finding,) = findings(audit(ROWS[3:], tokenizer, template, serve=url, date=other))
    assert "token 0 (template)" in finding.locations[0].detail or "token 1 (template)" in finding.locations[0].detail


def test_refused_conversation_is_a_finding(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir("tiny_bpe"))
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}" + CHATML
    with stand_in(make_tokenizer(tokenizer.with_template(template, tokenizer.special_tokens))) as (url, _):
        (finding,) = findings(audit(ROWS[1:2], tokenizer, CHATML, serve=url))
    assert "the server refuses the conversation: No system!" in finding.locations[0].detail


def test_internal_error_of_a_server_is_a_refusal(qwen, served):
    """llama.cpp answers with status 500 if its template raises an error."""
    with stand_in(served, fail=lambda number: (500, {"error": {"message": "No!"}}) if number > 1 else None) as (url, _):
        (finding,) = findings(audit(ROWS[3:], qwen, serve=url))
    assert "the server refuses the conversation: No!" in finding.locations[0].detail


def test_busy_server_is_asked_again(qwen, served):
    failures = {3: (503, "busy"), 4: (429, "slow down"), 5: (500, "oops")}
    with stand_in(served, fail=failures.get) as (url, _):
        assert findings(audit(ROWS[3:], qwen, serve=url)) == []


def test_servers_that_cannot_be_used_are_refused(qwen, served, tmp_path, monkeypatch):
    for url in (
        "localhost:8000",
        "ftp://x",
        "",
        "http://",
        "http://localhost:99999",
        "http://[::1",
        "http://a b",
        "http://a?x=1",
    ):
        with pytest.raises(UsageError, match="expected the URL of a server"):
            audit(ROWS, qwen, serve=url)
    with stand_in(served, "none") as (url, _), pytest.raises(UsageError, match="no request that renders"):
        audit(ROWS, qwen, serve=url)
    with pytest.raises(HubError, match="does not answer"):
        audit(ROWS, qwen, serve="http://127.0.0.1:9")
    busy = stand_in(served, fail=lambda number: (503, "busy") if number > 1 else None)
    with busy as (url, _), pytest.raises(HubError, match="status 503: busy"):
        audit(ROWS, qwen, serve=url)
    with stand_in(served, key="secret") as (url, _):
        with pytest.raises(UsageError, match="refuses access"):
            audit(ROWS[3:], qwen, serve=url)
        monkeypatch.setenv("FTDATA_SERVE_KEY", "secret")
        assert findings(audit(ROWS[3:], qwen, serve=url)) == []
    write_build(ROWS, qwen, tmp_path / "built")
    with pytest.raises(UsageError, match="cannot be read again"):
        audit(str(tmp_path / "built"), serve="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "options",
    [{"packing": "bfd", "max_length": 64}, {"where": "messages[0].role == 'system'", "turns": "split"}],
)
def test_builds_are_compared_by_their_data(options, qwen, served, tmp_path):
    rows, data, built = [*ROWS[:2], ROWS[1]], tmp_path / "data.jsonl", tmp_path / "built"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_build(str(data), qwen, built, **options)
    with stand_in(served, **INJECTIONS["bos"]) as (url, _):
        report = audit(str(built), serve=url)
    assert sum(finding.count for finding in findings(report)) > 0
    with stand_in(served) as (url, _):
        report = audit(str(built), serve=url)
        typed = [row for row in rows if "typed" in str(row)]
        assert sum(finding.count for finding in findings(report)) <= len(typed)
        data.write_text("".join(json.dumps(row).replace("brief", "short") + "\n" for row in rows))
        with pytest.raises(InputRefused, match="of .*built are not in its data"):
            audit(str(built), serve=url)
        data.unlink()
        with pytest.raises(UsageError, match="cannot be read again"):
            audit(str(built), serve=url)


def test_all_policies_compare_the_same_turns(qwen, served):
    """The prompt of a turn does not depend on which tokens are trained."""
    rows = [ROWS[1], ROWS[3]]
    for policy, count in (("assistant", 2), ("all", 2), ("last_assistant", 2)):
        with stand_in(served, change_ids=lambda ids: [5, *ids]) as (url, _):
            (finding,) = findings(audit(rows, qwen, serve=url, train_on=policy))
        assert finding.count == count
    with stand_in(served) as (url, _):
        assert findings(audit(rows, qwen, serve=url, train_on="all")) == []


def test_rows_that_are_not_compared_are_counted(qwen, served):
    rows = [{"text": "a b"}, {"prompt_token_ids": [40], "completion_token_ids": [41]}, ROWS[3]]
    with stand_in(served) as (url, requests):
        report = audit(rows, qwen, serve=url)
    assert report.skipped["serving"] == "2 of 3 rows were not compared: text, tokens or images"
    assert CONFIRMED not in report.confirmed
    assert findings(report) == []
    # Differences of the other rows are reported.
    with stand_in(served, change_ids=lambda ids: [5, *ids]) as (url, requests):
        assert len(findings(audit(rows, qwen, serve=url))) == 1
    assert len([body for _, body in requests if "Hi?" in str(body)]) == 1


@pytest.mark.parametrize(
    "content",
    [
        "<html>",
        "[" * 100_000,
        {"token_ids": [1 << 31]},
        {"token_ids": [-1]},
        {"token_ids": [10**80]},
        {"token_ids": "x"},
        {},
        [],
    ],
)
def test_unknown_answers_of_a_server_are_an_error(content, qwen, served):
    strange = stand_in(served, fail=lambda number: (200, content) if number > 1 else None)
    with strange as (url, _), pytest.raises(HubError, match="unknown form|does not answer"):
        audit(ROWS[3:], qwen, serve=url)


def test_server_that_refuses_everything_is_refused(qwen, served):
    refusing = stand_in(served, fail=lambda number: (422, {"detail": "unknown path"}))
    with refusing as (url, _), pytest.raises(UsageError, match="refuses a conversation with one message: unknown path"):
        audit(ROWS[3:], qwen, serve=url)


def test_key_of_the_server_can_end_with_a_line_break(qwen, served, monkeypatch):
    monkeypatch.setenv("FTDATA_SERVE_KEY", "secret\n")
    with stand_in(served, key="secret") as (url, _):
        assert findings(audit(ROWS[3:], qwen, serve=url)) == []
    monkeypatch.setenv("FTDATA_SERVE_KEY", "a\nb")
    with stand_in(served) as (url, _), pytest.raises(UsageError, match="contains a control character"):
        audit(ROWS[3:], qwen, serve=url)


def test_audit_without_a_server_names_the_option(qwen):
    assert audit(ROWS, qwen).skipped["serving"] == "--serve"
