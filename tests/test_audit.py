"""Each check fires where it should, and stays silent where it nearly should; a large data set, clean and with faults."""

import json
import random

import numpy as np
import pytest
import xxhash
from chats import ANSWER, HEAD, LATE_STOP, PROMPT, TALK, TOOLED, TURN, USER, template
from makers import CHATML, deepseek, tiny_bpe

from ftdata import audit, build_sft_dataset
from ftdata.errors import UsageError
from ftdata.look import detect
from ftdata.look.checks import checks
from ftdata.tokenize import load_tokenizer


def talk(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


PLAIN = talk("a question", "an answer")
DEFAULT = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + CHATML
DATED = "{% if messages[0].role == 'system' %}{{ messages[0].content }} {{ strftime_now('%Y') }}{% endif %}" + CHATML
TAGGED = template(
    HEAD
    + "{% if m.role == 'assistant' %}{% generation %}"
    + TURN.strip()
    + "{% endgeneration %}\n{% else %}"
    + TURN
    + "{% endif %}",
    "",
)
UNTAGGED = template(
    HEAD
    + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n{% else %}"
    + TURN
    + "{% endif %}"
)
CUTS = template(HEAD + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n")
THINKS = template(HEAD + "{{ m.reasoning_content or '' }}" + TURN)
TOOLS = "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.description }}\n{% endfor %}" + CHATML
TOOL = {"type": "function", "function": {"name": "find", "description": "finds", "parameters": {}}}
IDS = {"input_ids": [1, 40, 41, 2, 1, 42, 2], "labels": [-100] * 5 + [42, 2]}


def rows(*given, **options):
    return [*given], options


# code -> (what makes it fire, what nearly does)
CASES = {
    "no_stop": (rows({"input_ids": [1, 40, 41], "labels": [-100, 40, 41]}), rows({"text": "a stop<|im_end|>"})),
    "truncated_answer": (
        rows(talk("q", "a long answer " * 20), max_length=30, overlong="truncate"),
        rows(talk("q", "short", "q", "a long answer " * 20), max_length=40, overlong="drop_turns"),
    ),
    "unclosed_final": (rows(talk("q", "a"), template=LATE_STOP), rows(talk("q", "a"), template=CHATML)),
    "content_cut": (rows(talk("q", "hm</think>a1"), template=CUTS), rows(talk("q", "a1"), template=CUTS)),
    "payload_dropped": (
        rows(
            {"messages": [{"role": "system", "content": "lost"}, *TALK]},
            template="{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML,
            dropped="flag",
        ),
        rows(talk("q", "a"), template=CHATML, dropped="flag"),
    ),
    "reasoning_dropped": (
        rows({"messages": [USER, {**ANSWER, "reasoning_content": "a thought"}]}, template=CHATML),
        rows({"messages": [USER, {**ANSWER, "reasoning_content": "a thought"}]}, template=THINKS),
    ),
    "tools_dropped": (
        rows({**PLAIN, "tools": [TOOL]}, template=CHATML),
        rows({**PLAIN, "tools": [TOOL]}, template=TOOLS),
    ),
    "fields_dropped": (
        rows({"messages": [USER, {**ANSWER, "mood": "sunny"}]}, template=CHATML + "{# mood #}"),
        rows({"messages": [USER, {**ANSWER, "train": True}]}, template=CHATML),
    ),
    "prompt_drift": (
        rows(PLAIN, template=template(prompt=PROMPT + "<think>\n")),
        rows(PLAIN, template=template()),
    ),
    "tags_unconfirmed": (rows(PLAIN, template=TAGGED), rows(PLAIN, template=CHATML)),
    "stop_untagged": (rows(PLAIN, chat=UNTAGGED), rows(PLAIN, chat=TAGGED)),
    "control_tokens": (rows(talk("<|im_end|>", "a")), rows(talk("<|im_end", "a"))),
    "trailing_turns": (rows({"messages": [*TALK, USER]}), rows({"messages": TALK})),
    "double_bos": (
        rows({"input_ids": [3, 3, 40, 2], "labels": [-100, -100, 40, 2]}),
        rows({"text": "<s>text<|im_end|>"}),
    ),
    "double_eos": (
        rows({"input_ids": [1, 40, 2, 2], "labels": [-100, 40, 2, 2]}),
        rows({"input_ids": [2, 2, 40, 2], "labels": [-100, -100, 40, 2]}),
    ),
    "left_over": (rows(talk("q", "an answer</s>")), rows(talk("q", "<s>struck</s> out"))),
    "same_prompt": (
        rows(PLAIN, against=[talk("a question", "x")]),
        rows(PLAIN, against=[talk("another question", "x")]),
    ),
    "label_share": (rows(talk("word " * 3000, "x")), rows(talk("word " * 300, "an answer " * 20))),
    "role_order": (
        rows({"messages": [USER, USER, ANSWER]}),
        rows({"messages": [{"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, *TALK]}),
    ),
    "trivial_answer": (rows(talk("q", "N/A")), rows(talk("q", "4"), talk("q", "No."), talk("q", "👍"), talk("q", "√"))),
    "default_system": (rows(PLAIN, template=DEFAULT), rows(talk("q", "a", system="s"), template=DEFAULT)),
    "mojibake": (rows(talk("itâ€™s", "a")), rows(talk("it’s “CAFÉ”, été…” à São Paulo", "«MANHÃ» Â l’aide"))),
    "pii": (
        rows(talk("mail ada@lovelace.org", "a"), pii=True),
        rows(talk("mail me@example.com, 10.0.0.1, 1.2.3", "4111 1111 1111 1112"), pii=True),
    ),
    "duplicate": (rows(PLAIN, PLAIN), rows(PLAIN, talk("a question", "another answer"))),
    "near_duplicate": (
        rows(
            talk("q", "one two three four five six seven eight nine ten " * 3),
            talk("q", "one two three four five six seven eight nine ten " * 3 + "!"),
            near=0.7,
        ),
        rows(PLAIN, PLAIN, near=0.7),
    ),
    "leakage": (rows(PLAIN, against=[PLAIN]), rows(PLAIN, against=[talk("another question", "an answer")])),
    "script": (
        rows(*[talk(f"q{n}", f"answer {n}") for n in range(300)], talk("q", "привет, как дела")),
        rows(*[talk(f"q{n}", f"answer {n}") for n in range(300)], talk("привет", "hello")),
    ),
    "pad_is_stop": (rows(PLAIN, pad="<|im_end|>"), rows(PLAIN)),
    "date_inserted": (rows(talk("q", "a", system="s"), template=DATED), rows(PLAIN)),
    "template_drift": (rows(PLAIN, template="zephyr"), rows(PLAIN, template="{# mine #}" + CHATML)),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")

    def get(pad="<|pad|>", chat=CHATML):
        path = folder / xxhash.xxh3_64_hexdigest(f"{pad} {chat}".encode())
        return str(path) if path.exists() else tiny_bpe(path, chat, bos="<s>", pad=pad)

    return get


def found(tokenizer, given, options):
    made = {name: options[name] for name in ("pad", "chat") if name in options}
    return audit(given, tokenizer(**made), **{name: value for name, value in options.items() if name not in made})


def test_every_check_is_tried():
    assert set(CASES) == set(checks)


@pytest.mark.parametrize("code", CASES)
def test_a_check_fires(tokenizer, code):
    report = found(tokenizer, *CASES[code][0])
    (finding,) = [one for one in report.findings if one.code == code]
    assert finding.severity == checks[code].severity
    assert finding.fix in str(report)
    assert code not in {
        one.code for one in found(tokenizer, CASES[code][0][0], {**CASES[code][0][1], "ignore": [code]}).findings
    }


@pytest.mark.parametrize("code", CASES)
def test_a_check_stays_silent(tokenizer, code):
    assert code not in {one.code for one in found(tokenizer, *CASES[code][1]).findings}


def test_what_was_asked_for_alone_is_said_to_be_left_out(tokenizer):
    report = found(tokenizer, [PLAIN], {})
    assert not report
    assert report.skipped == {"pii": "--pii", "near_duplicate": "--near"}
    assert "not looked for: pii (--pii); near_duplicate (--near)" in str(report)


def test_rejected_rows_are_findings_by_their_codes(tokenizer):
    report = found(tokenizer, [talk("q", ""), PLAIN, "no row"], {})
    assert {one.code: one.where for one in report.findings} == {
        "empty_answer": ["<memory>[0]"],
        "not_a_row": ["<memory>[2]"],
    }
    assert not found(tokenizer, [talk("q", "")], {"ignore": ["empty_answer"]})


# --- a large one

WORDS = [
    "river",
    "market",
    "engine",
    "letter",
    "garden",
    "winter",
    "bridge",
    "forest",
    "signal",
    "copper",
    "window",
    "harbour",
    "valley",
    "lantern",
    "basket",
    "thread",
    "meadow",
    "candle",
    "ladder",
    "pepper",
    "compass",
    "island",
    "barrel",
    "anchor",
    "feather",
    "marble",
    "saddle",
    "kettle",
    "orchard",
    "tunnel",
]
ASKED = ("Explain how the {} and the {} differ when a {} is near {}.", "Write {} sentences about a {} in the {} of {}.",
         "What would happen to the {} if every {} became a {} in {}?", "Summarise: the {} met the {} beside a {} at {}.")  # fmt: skip


def prose(chance, words):
    return " ".join(chance.choice(WORDS) for _ in range(words)).capitalize() + chance.choice((".", "!", ".", "…"))


def conversation(chance, number):
    messages = [{"role": "system", "content": f"You answer as clerk {number % 7}."}] if chance.random() < 0.3 else []
    for turn in range(chance.choice((1, 1, 1, 2, 3))):
        asked = chance.choice(ASKED).format(*(f"{chance.choice(WORDS)} {chance.randrange(10**6)}" for _ in range(4)))
        answer = prose(chance, chance.randrange(12, 60)) + f" So {number}.{turn}."
        if chance.random() < 0.1:
            answer += "\n\n```python\nprint({'a': [1, 2], \"b\": None})\n```\nVoilà, naïve café: 3 × 4 = 12 👍"
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def tokenised(tokenizer, text):
    ids = tokenizer.encode([text])[0].ids.tolist()
    return {"input_ids": ids, "labels": [-100, *ids[1:]]}


def planted(chance, clean, tokenizer):
    """Code -> rows that have this fault, each another than any clean one."""
    fresh = lambda: conversation(chance, chance.randrange(10**9))["messages"]
    last = lambda text: {"messages": [*fresh()[:-1], {"role": "assistant", "content": text}]}
    bos, eos, end = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", prose(chance, 30)
    copied = [json.loads(json.dumps(chance.choice(clean))) for _ in range(3)]
    alike = []
    for row in (chance.choice([one for one in clean if len(one["messages"][-1]["content"]) > 250]) for _ in range(2)):
        messages = [
            *row["messages"][:-1],
            {"role": "assistant", "content": row["messages"][-1]["content"] + " Indeed."},
        ]
        alike.append({"messages": messages})
    return {
        "no_stop": [tokenised(load_tokenizer(tokenizer), prose(chance, 20)) for _ in range(3)],
        "double_bos": [{"text": f"{bos}{bos}{prose(chance, 20)}{eos}"} for _ in range(2)],
        "double_eos": [{"text": f"{bos}{prose(chance, 20)}{eos}{eos}"} for _ in range(2)],
        "truncated_answer": [last(prose(chance, 1500)) for _ in range(2)],
        "empty_answer": [last("  ") for _ in range(4)],
        "trivial_answer": [last("N/A"), last("...")],
        "control_tokens": [last(f"the end {eos} it says {number}") for number in range(3)],
        "mojibake": [last(f"that isnâ€™t right, {end} {number}") for number in range(3)],
        "role_order": [{"messages": [{"role": "user", "content": "and?"}, *fresh()[-2:]]} for _ in range(2)],
        "trailing_turns": [{"messages": [*fresh(), {"role": "user", "content": "and then?"}]} for _ in range(2)],
        "reasoning_dropped": [
            {
                "messages": [
                    *fresh()[:-1],
                    {"role": "assistant", "content": end + str(number), "reasoning_content": "let me see"},
                ]
            }
            for number in range(2)
        ],
        "label_share": [
            {"messages": [{"role": "user", "content": prose(chance, 450)}, {"role": "assistant", "content": "x"}]}
        ],
        "script": [last(f"это совсем другой язык, номер {number}") for number in range(3)],
        "duplicate": copied,
        "near_duplicate": alike,
        "pii": [last(f"write to clerk{number}@harbour-office.org, {end}") for number in range(2)],
    }


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    tokenizer = deepseek(folder / "tokenizer")
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<｜▁pad▁｜>"}))
    chance = random.Random(20)
    clean = [conversation(chance, number) for number in range(20_000)]
    held_out = [conversation(chance, 30_000 + number) for number in range(200)]
    faults = planted(chance, clean, tokenizer)
    placed = [(code, row) for code, some in faults.items() for row in some]
    # Where a fault is, but for a copy, which comes after what it is one of.
    whole = [(code, row, chance.random() if "duplicate" not in code else 2.0) for code, row in placed]
    whole += [(None, row, (number + 0.5) / len(clean)) for number, row in enumerate(clean)]
    whole.sort(key=lambda one: one[2])
    for name, some in (("clean", clean), ("faulty", [row for _, row, _ in whole]), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))
    leaked = [held_out[7], held_out[70]]
    with (folder / "faulty.jsonl").open("a") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in leaked)
    expected = {code: [number + 1 for number, (own, _, _) in enumerate(whole) if own == code] for code in faults}
    return folder, tokenizer, {**expected, "leakage": [8, 71]}


OPTIONS = {"max_length": 1024, "overlong": "truncate", "near": 0.8, "pii": True}


@pytest.mark.timeout(600)
def test_a_clean_data_set_has_no_findings(large):
    folder, tokenizer, _ = large
    report = audit(folder / "clean.jsonl", tokenizer, against=folder / "held_out.jsonl", **OPTIONS)
    assert str(report).splitlines() == ["20,200 rows, 0 findings"]
    assert not report.fails("note")


@pytest.mark.timeout(600)
def test_all_faults_are_found_and_nothing_else(large):
    folder, tokenizer, expected = large
    report = audit(folder / "faulty.jsonl", tokenizer, against=folder / "held_out.jsonl", **OPTIONS)
    assert {one.code: [place.source.line for place in one.places] for one in report.findings} == expected
    assert {one.code: one.count for one in report.findings} == {code: len(lines) for code, lines in expected.items()}


@pytest.mark.timeout(600)
def test_a_build_of_them_has_the_findings_that_tokens_tell(large, tmp_path):
    folder, tokenizer, expected = large
    data = [{"path": folder / "faulty.jsonl"}]
    build_sft_dataset(
        data,
        tokenizer,
        output_dir=tmp_path / "built",
        max_length=1024,
        overlong="truncate",
        packing="bfd",
        on_bad_rows="quarantine",
        max_rejects=10,
    )
    report = audit(tmp_path / "built", near=None, pii=True)
    told = {one.code: sorted(place.source.line for place in one.places) for one in report.findings}
    of_tokens = set(expected) - {
        "empty_answer",
        "trivial_answer",
        "role_order",
        "leakage",
        "near_duplicate",
        "duplicate",
    }
    assert {code: lines for code, lines in told.items() if code != "duplicate"} == {
        code: expected[code] for code in of_tokens
    }
    (finding,) = [one for one in report.findings if one.code == "duplicate"]
    assert finding.count == len(expected["duplicate"])


# --- how it is told


def test_sarif_names_rules_files_and_lines(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (PLAIN, PLAIN, talk("q", ""))))
    report = audit(path, tokenizer())
    sarif = report.as_sarif()
    (run,) = sarif["runs"]
    assert sarif["version"] == "2.1.0"
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["empty_answer", "duplicate"]
    result = run["results"][1]
    assert result["level"] == "warning"
    place = result["locations"][0]["physicalLocation"]
    assert (place["artifactLocation"]["uri"], place["region"]["startLine"]) == (str(path), 2)
    assert f"equal to {path}:1" in result["message"]["text"]


def test_names_of_files_drive_no_terminal(tokenizer, tmp_path):
    path = tmp_path / "we\x1b[31mird\n::error::f.jsonl"
    path.write_text(json.dumps(talk("q", "N/A")) + "\n")
    report = audit(path, tokenizer())
    for text in (str(report), report.as_github()):
        assert "\x1b" not in text
        assert "\n::error" not in text


def test_annotations_cannot_be_broken_out_of(tokenizer, tmp_path):
    path = tmp_path / "a,b:c%.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (PLAIN, talk("q", "N/A"))))
    lines = audit(path, tokenizer()).as_github().splitlines()
    assert lines[0].startswith(f"::warning file={tmp_path}/a%2Cb%3Ac%25.jsonl,line=2,title=trivial_answer::")
    assert len(lines) == 1


def test_the_worst_comes_first_and_decides(tokenizer):
    report = found(tokenizer, [PLAIN, PLAIN, talk("q", ""), {"messages": [USER, {**ANSWER, "mood": "sunny"}]}], {})
    assert [one.severity for one in report.findings] == ["error", "warning", "note"]
    assert [report.fails(one) for one in ("note", "warning", "error", "never")] == [True, True, True, False]
    quiet = found(tokenizer, [{"messages": [USER, {**ANSWER, "mood": "sunny"}]}], {})
    assert [quiet.fails(one) for one in ("note", "warning", "error", "never")] == [True, False, False, False]
    with pytest.raises(UsageError, match="did you mean 'error'"):
        quiet.fails("eror")


def test_requests_that_nobody_can_mean(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="no_tokenizer"):
        audit([PLAIN])
    with pytest.raises(UsageError, match="expected a similarity"):
        audit([PLAIN], tokenizer(), near=0.2)
    build_sft_dataset([PLAIN], tokenizer(), output_dir=tmp_path / "built")
    with pytest.raises(UsageError, match="template is said of a build"):
        audit(tmp_path / "built", template="chatml")


@pytest.mark.parametrize(("text", "right"), [("4111 1111 1111 1111", True), ("4111-1111-1111-1112", False), ("DE89370400440532013000", True),
    ("DE88370400440532013000", False), ("078-05-1120", True), ("000-12-3456", False), ("8.8.8.8", True), ("192.168.0.1", False), ("1.2.3.4.5", False),
    ("+44 20 7946 0958", True), ("3.14159265358979", False), ("2024-01-02 10:20", False), ("sk-" + "a1" * 12, True), ("ada@lovelace", False)])  # fmt: skip
def test_what_looks_personal(text, right):
    assert bool(list(detect.personal(f"see {text} there"))) is right


def test_scripts_of_texts_that_mix_them():
    assert detect.SCRIPTS[detect.script("HTTP ответ сервера")] == "Cyrillic"
    assert detect.script("1234 + 5") == -1
    assert detect.script("→ ∑ ✓") == -1
    assert np.unique([detect.script(text) for text in ("ascii", "naïve", "Straße", "Ứng")]).tolist() == [0]


def test_the_checks_in_the_docs_are_those_of_the_code():
    """`python docs/checks.py > docs/checks.md` writes them anew."""
    import subprocess
    import sys
    from pathlib import Path

    docs = Path(__file__).parents[1] / "docs"
    made = subprocess.run([sys.executable, docs / "checks.py"], capture_output=True, text=True, check=True).stdout
    assert (docs / "checks.md").read_text() == made


def test_a_rejected_row_is_an_error_whatever_else_has_its_code(tokenizer):
    loses = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + CHATML
    system = {"messages": [{"role": "system", "content": "lost"}, *TALK]}
    calls = {"messages": TOOLED}
    report = found(tokenizer, [system, system, calls], {"template": loses, "dropped": "flag"})
    told = [(one.code, one.severity, one.count) for one in report.findings if one.code == "payload_dropped"]
    assert told == [("payload_dropped", "error", 1), ("payload_dropped", "warning", 2)]


def test_what_is_held_out(tokenizer, tmp_path):
    data = [PLAIN, talk("another", "answer")]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    given = tokenizer()
    # The data is what is trained on, whatever its split is called.
    (finding,) = audit([{"path": tmp_path, "split": "test"}], given, against=data[:1]).findings
    assert (finding.code, finding.where) == ("leakage", ["<against memory>[0]"])
    assert [
        one.code for one in audit([{**PLAIN, "lang": "en"}], given, against=data, where="lang == 'en'").findings
    ] == ["leakage"]
    assert [one.code for one in audit(data, given, against=data[1:], limit=1).findings] == []
    assert [one.code for one in audit(data, given, against=data[:1], limit=1).findings] == ["leakage"]
    from datasets import Dataset, DatasetDict

    splits = DatasetDict({name: Dataset.from_list([PLAIN]) for name in ("train_sft", "test_sft")})
    assert [one.code for one in audit(splits, given).findings] == ["leakage"]


@pytest.mark.parametrize("text", ["Ã–sterreich", "â†’ next", "5 â‚¬", "Â¡Hola!", "it\x92s", "NoÃ«l", "РџСЂРёРІРµС‚", "ÎºÎ±Î»Î·Î¼Î­ÏÎ±",
    "×©×œ×•×", "Ù…Ø±Ø­Ø¨Ø§", "ì•ˆë…•", "à¤¨à¤®", "ðŸ˜€", "MiÄ™dzy", "sÅ‚owami", "PÅ™iÅ¡el", "yaÅŸÄ±yorum", "Ä‘Æ°á»", "È˜i", "itâ€™s", "ã\x81\x93ã\x82\x93"])  # fmt: skip
def test_wrong_encodings(text):
    assert detect.mojibake(text)


@pytest.mark.parametrize(
    "text",
    [
        "“CAFÉ”",
        "été…” dit-il",
        "«MANHÃ»",
        "à « demain »",
        "Ñandú, año",
        "Привет, Россия",
        "×, ÷ ±",
        "şÎnceput",
        "Üben–Ärger",
        "…”",
        "naïve—à",
    ],
)
def test_right_encodings(text):
    assert detect.mojibake(text) is None


def test_scripts_are_those_of_what_is_said(tokenizer):
    answers = [f"東京都です、{number}" for number in range(300)]
    assert not found(tokenizer, [talk(f"質問 {n}", one) for n, one in enumerate([*answers, "東京", "富士山"])], {})
    (finding,) = found(
        tokenizer, [talk(f"質問 {n}", one) for n, one in enumerate([*answers, "in English, all of it"])], {}
    ).findings
    assert (finding.code, finding.count) == ("script", 1)


def test_findings_of_a_build_name_the_files_it_is_made_of(tokenizer, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(PLAIN) + "\n")
    build_sft_dataset([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tokenizer(), output_dir=tmp_path / "built")
    (finding,) = audit(tmp_path / "built").findings
    assert (finding.code, finding.where, finding.places[0].says) == (
        "duplicate",
        [f"{tmp_path}/b.jsonl:1"],
        f"equal to {tmp_path}/a.jsonl:1",
    )


def test_the_command(tokenizer, tmp_path):
    import subprocess
    import sys

    path, latin = tmp_path / "d.jsonl", tmp_path / "latin.jsonl"
    path.write_text(json.dumps({"messages": [USER, {**ANSWER, "mood": "sunny"}]}) + "\n")
    latin.write_bytes(json.dumps(talk("où", "là"), ensure_ascii=False).encode("cp1252") + b"\n")

    def run(*arguments):
        command = [sys.executable, "-m", "ftdata", "audit", *map(str, arguments), "-t", tokenizer()]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert [run(path, "--fail-on", one).returncode for one in ("note", "warning")] == [1, 0]
    assert json.loads(run(path, "--format", "sarif").stdout)["version"] == "2.1.0"
    assert run(path, "--format", "github").stdout.startswith("::notice file=")
    assert json.loads(run(path, "--json").stdout)["findings"][0]["code"] == "fields_dropped"
    assert run(path, "--ignore", "fields_dropped").returncode == 0
    assert "did you mean 'duplicate'" in run(path, "--ignore", "dupliacte").stderr
    assert run(path, "--where", "false").returncode == 3
    done = run(latin, "--encoding", "cp1252", "--against", latin)
    assert (done.returncode, "error leakage" in done.stdout) == (1, True)
    plain = run(path).stdout
    assert plain.startswith("note fields_dropped\n    1 × ")


def test_results_of_tools_under_other_names_are_results(tokenizer):
    rows = [{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                               {"from": "observation", "value": "ok"}, {"from": "gpt", "value": "done"}]}]  # fmt: skip
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert "role_order" not in {one.code for one in found(tokenizer, rows, {"template": template}).findings}
    rows[0]["conversations"].pop(2)
    assert "role_order" in {one.code for one in found(tokenizer, rows, {"template": template}).findings}
