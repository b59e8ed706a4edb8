"""Splits: seeded and reproducible, of complete rows, and without leakage."""

import itertools
import json
import sys

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftdata import build_sft_dataset
from ftdata.build import near_duplicates
from ftdata.build.splits import ExampleFacts, Layout, assign_splits, seeded_hash
from ftdata.errors import InputRefused, MissingDependency, TooManyRejects, UsageError
from ftdata.types import WHOLE, Conversation, SourceShare

ROWS = [{"question": f"What is {n}?", "answer": f"It is {n}.", "lang": "en" if n % 3 else "de"} for n in range(30)]


def facts(rows, splits=(None,), shares=(WHOLE,), tokens=1):
    """Return `ExampleFacts` for rows given as (source, content, number of examples)."""
    of = [(source, at, content) for at, (source, content, count) in enumerate(rows) for _ in range(count)]
    source, row, content = zip(*of, strict=True) if of else ((), (), ())
    return ExampleFacts(
        np.array(source, np.int64),
        np.array(row, np.int64),
        np.array(content, np.int64),
        np.array(content, np.int64),
        np.broadcast_to(tokens, len(row)),
        splits,
        shares,
    )


rows = st.lists(st.tuples(st.just(0), st.integers(0, 9), st.integers(1, 3)), min_size=2, max_size=40)


def whole_rows(given_rows, numbers):
    """Return the rows of these examples; assert that each row is complete and in order."""
    begins = np.cumsum([0, *(count for *_, count in given_rows)])
    found, at = [], 0
    while at < len(numbers):
        row = int(np.searchsorted(begins, numbers[at], side="right")) - 1
        count = given_rows[row][2]
        assert numbers[at : at + count].tolist() == list(range(begins[row], begins[row] + count))
        found.append(row)
        at += count
    return found


@given(rows=rows, seed=st.integers(0, 2**64), size=st.integers(1, 39), dedup=st.booleans(), shuffle=st.booleans())
def test_split_shares_no_row_with_train(rows, seed, size, dedup, shuffle):
    unique = len({content for _, content, _ in rows})
    layout = Layout(test_size=size, seed=seed, dedup=dedup, shuffle=shuffle)
    if size >= (unique if dedup else len(rows)):
        with pytest.raises(UsageError, match="no row is left to train on"):
            assign_splits(facts(rows), layout)
        return
    equal = max(sum(other[1] == row[1] for other in rows) for row in rows)
    try:
        laid = assign_splits(facts(rows), layout)
    except UsageError as error:
        assert "every group of identical rows is larger" in str(error)
        assert not dedup
        assert equal > size
        return
    train, test = (whole_rows(rows, laid.splits[name]) for name in ("train", "test"))
    assert not {rows[one][1] for one in train} & {rows[one][1] for one in test}
    assert len(test) <= size
    kept = sorted(train + test)
    assert kept == (
        [one for one, (_, content, _) in enumerate(rows) if content not in [c for _, c, _ in rows[:one]]]
        if dedup
        else list(range(len(rows)))
    )
    assert laid.left_out["duplicate"] == (len(rows) - unique if dedup else 0)
    assert train == sorted(train) or shuffle


@given(rows=rows, sample=st.integers(1, 50) | st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_sample_has_the_requested_size(rows, sample, seed):
    laid = assign_splits(facts(rows), Layout(sample=sample, seed=seed))
    taken = whole_rows(rows, laid.splits["train"])
    expected = min(sample, len(rows)) if sample >= 1 else int(np.ceil(sample * len(rows)))
    assert len(taken) == len(set(taken)) == expected
    assert laid.left_out["not sampled"] == len(rows) - expected
    assert taken == sorted(taken)


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.75, 2.0, 3.0]), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_rows_are_repeated_according_to_the_weight_of_their_source(sizes, weights, seed):
    rows = [(source, number, 1) for source, size in enumerate(sizes) for number in range(size)]
    shares = [SourceShare(weight) for weight in weights[: len(sizes)]]
    laid = assign_splits(facts(rows, [None] * len(sizes), shares), Layout(seed=seed))
    counts = np.bincount(laid.splits["train"], minlength=len(rows))
    for source, size in enumerate(sizes):
        own = counts[[number for number, row in enumerate(rows) if row[0] == source]]
        weight = weights[source]
        assert own.sum() == int(np.floor(weight)) * size + round((weight - np.floor(weight)) * size)
        assert own.min() >= np.floor(weight)
        assert own.max() <= np.ceil(weight)


@given(
    tokens=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=3),
    amount=st.integers(0, 200),
    unit=st.sampled_from(["rows", "tokens"]),
    seed=st.integers(0, 99),
)
def test_source_contributes_the_requested_rows_or_tokens(tokens, amount, unit, seed):
    sizes = np.array([one for each in tokens for one in each])
    rows = [(source, number, 1) for source, each in enumerate(tokens) for number in range(len(each))]
    shares = [SourceShare(amount, unit)] + [WHOLE] * (len(tokens) - 1)
    laid = assign_splits(facts(rows, [None] * len(tokens), shares, sizes), Layout(seed=seed))
    counts = np.bincount(laid.splits["train"], minlength=len(rows))
    own = counts[: len(tokens[0])]
    assert (counts[len(tokens[0]) :] == 1).all()
    assert not amount or own.max() - own.min() <= 1
    if unit == "rows":
        assert own.sum() == amount
    else:
        taken = int((own * sizes[: len(own)]).sum())
        assert amount - max(tokens[0]) < taken <= amount


def test_existing_splits_are_kept_and_dedup_removes_leakage():
    given_rows = [(0, 1, 1), (0, 2, 1), (1, 2, 1), (1, 3, 1)]
    kept = assign_splits(facts(given_rows, ["train", "test"], [SourceShare(), SourceShare()]), Layout())
    assert {name: found.tolist() for name, found in kept.splits.items()} == {"train": [0, 1], "test": [2, 3]}
    apart = assign_splits(facts(given_rows, ["train", "test"], [SourceShare(), SourceShare()]), Layout(dedup=True))
    assert {name: found.tolist() for name, found in apart.splits.items()} == {"train": [0], "test": [2, 3]}


def test_seeded_order_is_the_same_everywhere():
    """The first outputs of SplitMix64 and the shuffle of ten rows by seed 42 must never change."""
    assert seeded_hash(np.arange(3, dtype=np.uint64), 0).tolist() == [
        16294208416658607535, 7960286522194355700, 487617019471545679
    ]  # fmt: skip
    laid = assign_splits(facts([(0, n, 1) for n in range(10)]), Layout(shuffle=True, seed=42))
    assert laid.splits["train"].tolist() == [3, 5, 6, 0, 9, 2, 4, 1, 8, 7]


def test_build_applies_filters_limits_and_samples(tokenizer_dir, tmp_path):
    tiny = tokenizer_dir("tiny_bpe")
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *ROWS[:5]]) + "{\n")
    options = {"on_bad_rows": "quarantine", "max_rejects": 1}
    built = build_sft_dataset(str(path), tiny, where="lang == 'en'", dedup=True, **options)
    assert len(built["train"]) == 20
    assert {name: built.report.totals[name] for name in ("read", "built", "filtered", "rejected")} == {
        "read": 36, "built": 23, "filtered": 12, "rejected": 1
    }  # fmt: skip
    assert "3 rows left out: duplicate" in built.report.notes
    assert len(build_sft_dataset(str(path), tiny, limit=7)["train"]) == 7
    assert len(build_sft_dataset(str(path), tiny, where="question is matching('1[0-9]')", limit=4)["train"]) == 4
    mixed_in = build_sft_dataset([{"path": str(path), "weight": 0.5}, {"path": str(path), "weight": 2}], tiny, limit=10)
    assert len(mixed_in["train"]) == 5 + 20
    sampled = [
        build_sft_dataset(str(path), tiny, sample=10, shuffle=True, seed=1, workers=n, **options) for n in (1, 2)
    ]
    assert sampled[0]["train"].to_dict() == sampled[1]["train"].to_dict()
    assert len(sampled[0]["train"]) == 10


@pytest.mark.parametrize(
    "options",
    [{"where": "lang =="}, {"limit": 0}, {"sample": -1}, {"sample": 1.5}, {"test_size": 0}],
)
def test_invalid_selection_options_are_refused(tokenizer_dir, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        build_sft_dataset(ROWS, tokenizer_dir("tiny_bpe"), **options)


@pytest.mark.parametrize("weight", [-1, "2", float("inf"), True])
def test_weights_must_be_nonnegative_numbers(tokenizer_dir, tmp_path, weight):
    (tmp_path / "d.jsonl").write_text('{"text": "t"}\n')
    with pytest.raises(UsageError, match="weight"):
        build_sft_dataset([{"path": str(tmp_path / "d.jsonl"), "weight": weight}], tokenizer_dir("tiny_bpe"))


def test_report_contains_the_share_of_each_source(tokenizer_dir, tmp_path):
    data = []
    for name, unit, amount in (("a", "rows", 50), ("b", "tokens", 400), ("c", "weight", 0.5)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        data.append({"path": path, unit: amount})
    built = build_sft_dataset(data, tokenizer_dir("tiny_bpe"))
    parts = built.report.splits["train"]["sources"]
    assert [part["examples"] for part in parts][::2] == [50, 15]
    assert 370 < parts[1]["tokens"] <= 400
    assert sum(part["tokens"] for part in parts) == sum(map(len, built["train"]["input_ids"]))
    assert f"50 examples, {parts[0]['tokens'] / built.report.splits['train']['tokens']:.1%}" in str(built.report)
    with pytest.raises(UsageError, match="expected only one of them"):
        build_sft_dataset([{**data[0], "weight": 2}], tokenizer_dir("tiny_bpe"))


def test_sources_of_weight_zero_are_in_no_split():
    given_rows = [(0, n, 1) for n in range(5)] + [(1, n, 1) for n in range(5, 10)]
    laid = assign_splits(facts(given_rows, [None, None], [SourceShare(0), SourceShare()]), Layout(test_size=2))
    assert sorted(np.concatenate(list(laid.splits.values())).tolist()) == [5, 6, 7, 8, 9]
    assert laid.left_out["weight 0"] == 5


def test_build_without_rows_is_refused(tokenizer_dir):
    for options, says in (
        ({"where": "lang == 'fr'"}, "filters out all 30 rows$"),
        ({"where": "'9' in anwser"}, "filters out all 30 rows; no row has the column 'anwser'; did you mean 'answer'"),
        ({"where": "language == 'en'"}, "filters out all 30 rows; no row has the column 'language'"),
        ({"test_size": 3}, "every group of identical rows is larger"),
    ):
        rows = ROWS if "where" in options else [ROWS[0]] * 10
        with pytest.raises((InputRefused, UsageError), match=says):
            build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), **options)


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def many(tmp_path):
    """Return a folder of ten files with one row each."""
    for number in range(10):
        lines(tmp_path / "many" / f"{number}.jsonl", [{"question": f"q{number}", "answer": "a", "n": number}])
    return str(tmp_path / "many")


def test_shares_and_limits_apply_to_a_source_with_many_files(tokenizer_dir, tmp_path, many):
    tiny, other = tokenizer_dir("tiny_bpe"), lines(tmp_path / "o.jsonl", ROWS)
    for amount, expected in (({"weight": 0.5}, 5), ({"weight": 1.5}, 15), ({"rows": 3}, 3)):
        built = build_sft_dataset([{"path": many, **amount}, other], tiny)
        own = [part["examples"] for part in built.report.splits["train"]["sources"] if "many" in part["source"]]
        assert sum(own) == expected
    for workers in (1, 2):
        limited = build_sft_dataset([many, other], tiny, limit=4, where="n is not defined or n > 2", workers=workers)
        assert [ledger.built for ledger in limited.report.sources] == [0, 0, 0, 1, 1, 1, 1, 4]
        assert limited.report.total("filtered") == 3


def test_where_filters_out_rows_without_the_column(tokenizer_dir):
    rows = [{**row, "score": n} if n % 2 else row for n, row in enumerate(ROWS)]
    tiny = tokenizer_dir("tiny_bpe")
    assert build_sft_dataset(rows, tiny, where="score > 3").report.total("built") == 13
    rows[1]["score"] = "high"
    options = {"where": "score > 3", "on_bad_rows": "quarantine"}
    assert build_sft_dataset(rows, tiny, **options, max_rejects=1).report.sources[0].rejected == {"where": 1}
    with pytest.raises(TooManyRejects, match="1 of 14 rows"):
        build_sft_dataset(rows, tiny, **options, max_rejects="6%")
    dashed = [{**row, "a-b": n, "talk": '["x", "y"]'} for n, row in enumerate(ROWS)]
    assert (
        build_sft_dataset(dashed, tiny, where="row['a-b'] < 5 and talk | from_json | length == 2").report.total("built")
        == 5
    )


def test_rows_with_equal_tokens_are_in_one_split(tokenizer_dir):
    def talk(n, train):
        said = [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "x", "train": train}]
        return {"messages": [*said, {"role": "user", "content": "z"}, {"role": "assistant", "content": "y"}]}

    rows = [talk(n, train) for n in range(20) for train in (True, False)]
    built = build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), test_size=0.5, turns="joint")
    assert not {*map(tuple, built["train"]["input_ids"])} & {*map(tuple, built["test"]["input_ids"])}
    assert len(build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), dedup=True, turns="joint")["train"]) == 40


def test_leakage_between_existing_splits_is_noted(tokenizer_dir):
    made = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS[:6]), "test": datasets.Dataset.from_list(ROWS[3:8])}
    )
    tiny = tokenizer_dir("tiny_bpe")
    assert "leakage: 3 rows of test also in train" in build_sft_dataset(made, tiny).report.notes
    sampled = build_sft_dataset(made, tiny, sample=2)
    assert [len(sampled[name]) for name in ("train", "test")] == [2, 5]
    with pytest.raises(UsageError, match="already has splits"):
        build_sft_dataset(made, tiny, sample=2, test_size=1)


@pytest.mark.parametrize(("size", "expected"), [(0.07, 7), (0.1, 10), (0.001, 1), (13, 13)])
def test_fractions_of_rows_are_exact(size, expected):
    laid = assign_splits(facts([(0, n, 1) for n in range(100)]), Layout(test_size=size))
    assert len(laid.splits["test"]) == expected
    assert len(assign_splits(facts([(0, n, 1) for n in range(100)]), Layout(sample=size)).splits["train"]) == expected


def poem(number, words=60):
    rng = np.random.default_rng(number)
    return [f"w{one}" for one in rng.integers(0, 4000, words)]


def test_near_duplicates_are_removed_or_stay_in_one_split(tokenizer_dir):
    """One of 60 words differs: 5 of 56 five-word shingles differ, of 61 in total, which is a similarity of 0.84."""
    system = {"role": "system", "content": "s " * 300}

    def row(words):
        return [
            system,
            {"role": "user", "content": " ".join(words[:20])},
            {"role": "assistant", "content": " ".join(words[20:])},
        ]

    rows = []
    for number in range(40):
        words = poem(number)
        rows.append(row(words))
        if number % 2:
            rows.append(row([*words[:30], "another", *words[31:]]))
    tiny = tokenizer_dir("tiny_bpe")
    for near, expected in ((0.7, 40), (0.97, 60)):
        assert len(build_sft_dataset(rows, tiny, dedup=True, near_duplicate_threshold=near)["train"]) == expected
    built = build_sft_dataset(rows, tiny, test_size=0.5, near_duplicate_threshold=0.7, workers=2)
    assert sum(map(len, built.values())) == 60
    firsts = [{tuple(ids[-40:][:10]) for ids in built[name]["input_ids"]} for name in ("train", "test")]
    assert not firsts[0] & firsts[1]


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=1, max_size=12))
def test_similarity_groups_equal_those_of_all_pairs(rows):
    """For rows that are either identical or unrelated, the bands find the same groups as comparing all pairs."""
    minhashes = np.repeat(np.array([one[0] for one in rows], np.uint32)[:, None], near_duplicates.PERMUTATIONS, axis=1)
    labels = near_duplicates.similarity_groups(minhashes, 0.8)
    assert [[a == b for b in labels] for a in labels] == [[one[0] == two[0] for two in rows] for one in rows]


def test_near_duplicate_threshold_needs_dedup_or_test_size_and_rensa(tokenizer_dir, monkeypatch):
    tiny = tokenizer_dir("tiny_bpe")
    with pytest.raises(UsageError, match="no effect without dedup or test_size"):
        build_sft_dataset(ROWS, tiny, near_duplicate_threshold=0.8)
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ftdata\[dedup\]'"):
        build_sft_dataset(ROWS, tiny, near_duplicate_threshold=0.8, dedup=True)


def test_limit_applies_to_each_split(tokenizer_dir, tmp_path):
    for name in ("train", "test"):
        lines(tmp_path / "fold" / f"{name}.jsonl", ROWS[:10])
    built = build_sft_dataset(str(tmp_path / "fold"), tokenizer_dir("tiny_bpe"), limit=3)
    assert {name: len(split) for name, split in built.items()} == {"train": 3, "test": 3}
    assert "leakage: 3 rows of test also in train" in built.report.notes
    one = build_sft_dataset([{"path": str(tmp_path / "fold"), "rows": 1}], tokenizer_dir("tiny_bpe"))
    assert "10 rows of test" not in str(one.report.notes)
    named = [{"path": str(tmp_path / "fold"), "split": name} for name in ("train", "test")]
    with pytest.raises(UsageError, match="a source of the split test has the option weight"):
        build_sft_dataset([named[0], {**named[1], "weight": 3}], tokenizer_dir("tiny_bpe"))
    taken = build_sft_dataset(str(tmp_path / "fold" / "test.jsonl"), tokenizer_dir("tiny_bpe"))
    assert any("the names suggest another split" in note for note in taken.report.notes)


@pytest.mark.parametrize("where", ["lng != 'en'", "not lng", "lng | length < 5", "lang not in lng", "dict", "range"])
def test_where_is_false_for_missing_columns(tokenizer_dir, where):
    with pytest.raises(InputRefused, match="filters out all 30 rows"):
        build_sft_dataset(ROWS, tokenizer_dir("tiny_bpe"), where=where)
    rows = [{**row, "row": n} for n, row in enumerate(ROWS)]
    assert build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), where="row == 3").report.total("built") == 1
    with pytest.raises(UsageError, match="not a valid regular expression"):
        build_sft_dataset(rows, tokenizer_dir("tiny_bpe"), where="question is matching('(')")


def talk(question, answer="a", system=None, **more):
    said = ({"role": "system", "content": system},) if system else ()
    return Conversation(
        (*said, {"role": "user", "content": question}, {"role": "assistant", "content": answer}), **more
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (talk("😀"), talk("😎")), (talk("2 + 2"), talk("2 * 2")), (talk("is x < 3"), talk("is x > 3")), (talk("-5"), talk("5")),
        (talk("राम की किताब"), talk("राम का कोताबा")),
        (talk("q " * 50, system="Translate to French"), talk("q " * 50, system="Translate to German")),
        (talk("q " * 50, tools=({"name": "a"},)), talk("q " * 50, tools=({"name": "b"},))),
    ],
)  # fmt: skip
def test_rows_with_different_meaning_are_not_near_duplicates(one, other):
    minhashes = near_duplicates.minhash_signatures([one, other, one])
    assert near_duplicates.first_similar(minhashes, 0.9).tolist() == [0, 1, 0]


def test_removed_row_does_not_remove_rows_similar_to_it():
    words = [f"w{n}" for n in range(2400)]
    windows = [talk(" ".join(words[20 * n : 20 * n + 400])) for n in range(100)]
    minhashes = near_duplicates.minhash_signatures(windows)
    assert len(set(near_duplicates.similarity_groups(minhashes, 0.8).tolist())) == 1
    stay = sorted(set(near_duplicates.first_similar(minhashes, 0.8).tolist()))
    assert 30 < len(stay) < 70
    assert all((minhashes[a, :128] == minhashes[b, :128]).mean() < 0.8 for a, b in itertools.pairwise(stay))


def test_groups_of_equal_rows_are_merged():
    labels, equal = np.array([0, 1, 1, 3, 4]), np.array(["a", "b", "c", "c", "d"])
    united = near_duplicates.merge_labels(labels, equal)
    assert [[x == y for y in united] for x in united] == [[x == y for y in (0, 1, 1, 1, 4)] for x in (0, 1, 1, 1, 4)]


def test_equal_examples_of_split_conversations_are_in_one_split(tokenizer_dir, tmp_path):
    """The first turn of a conversation that a template splits can equal another conversation."""
    rows = []
    for number in range(12):
        first = [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]
        thanks = [{"role": "user", "content": "thanks"}, {"role": "assistant", "content": f"welcome {number}"}]
        rows += [{"messages": first}, {"messages": first + thanks}]
    ds = build_sft_dataset(rows, tokenizer_dir("qwen"), test_size=0.3, output_dir=tmp_path / "built")
    train, test = ({tuple(ids) for ids in ds[name]["input_ids"]} for name in ("train", "test"))
    assert train
    assert test
    assert train.isdisjoint(test)
