"""Faults planted at random positions of a large data set: the audit finds exactly these faults."""

import json
import random
import shutil

import pytest
from cases import long

from ftdata import audit, build_sft_dataset
from ftdata.tokenizing.load import load_tokenizer

pytestmark = pytest.mark.slow

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
    """Return code -> rows with this fault; each row differs from every clean row."""
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
        "no_trained_stop": [tokenised(load_tokenizer(tokenizer), prose(chance, 20)) for _ in range(3)],
        "double_bos": [{"text": f"{bos}{bos}{prose(chance, 20)}{eos}"} for _ in range(2)],
        "double_eos": [{"text": f"{bos}{prose(chance, 20)}{eos}{eos}"} for _ in range(2)],
        "answer_truncated": [last(prose(chance, 1500)) for _ in range(2)],
        "empty_answer": [last("  ") for _ in range(4)],
        "trivial_answer": [last("N/A"), last("...")],
        "control_tokens": [last(f"the end {eos} it says {number}") for number in range(3)],
        "mojibake": [last(f"that isnâ€™t right, {end} {number}") for number in range(3)],
        "role_order": [{"messages": [{"role": "user", "content": "and?"}, *fresh()[-2:]]} for _ in range(2)],
        "trailing_messages": [{"messages": [*fresh(), {"role": "user", "content": "and then?"}]} for _ in range(2)],
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


@pytest.fixture(scope="module", params=[400, *map(long, (1_500, 20_000))])
def large(request, tokenizer_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    tokenizer = shutil.copytree(tokenizer_dir("deepseek"), folder / "tokenizer")
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<｜▁pad▁｜>"}))
    chance = random.Random(20)
    clean = [conversation(chance, number) for number in range(request.param)]
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
    # A near-duplicate has the same prompt as the row that it is similar to.
    expected |= {"leakage": [8, 71], "contradiction": expected["near_duplicate"]}
    return folder, tokenizer, expected, len(clean) + len(held_out)


OPTIONS = {"max_length": 1024, "overlong": "truncate", "near_duplicate_threshold": 0.8, "pii": True}


@pytest.mark.timeout(600)
def test_clean_data_set_has_no_findings(large):
    folder, tokenizer, _, rows = large
    report = audit(folder / "clean.jsonl", tokenizer, against=folder / "held_out.jsonl", **OPTIONS)
    assert str(report).splitlines()[0] == f"{rows:,} rows: no problems found"
    assert str(report).splitlines()[2:] == ["Skipped checks: serving (--serve)"]
    assert not report.fails("note")


@pytest.mark.timeout(600)
def test_exactly_the_planted_faults_are_found(large):
    folder, tokenizer, expected, _ = large
    report = audit(folder / "faulty.jsonl", tokenizer, against=folder / "held_out.jsonl", **OPTIONS)
    assert {one.code: [place.source.line for place in one.locations] for one in report.findings} == expected
    assert {one.code: one.count for one in report.findings} == {code: len(lines) for code, lines in expected.items()}


@pytest.mark.timeout(600)
def test_build_has_the_findings_that_depend_on_tokens(large, tmp_path):
    folder, tokenizer, expected, _ = large
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
    report = audit(tmp_path / "built", near_duplicate_threshold=None, pii=True)
    told = {one.code: sorted(place.source.line for place in one.locations) for one in report.findings}
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
