"""The HTML page in a real browser: it shows exactly the built tokens, and the text of rows is always escaped."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from tokenizer_makers import CHATML, tiny_bpe

from ftdata import build_sft_dataset, preview
from ftdata.errors import UsageError

pytestmark = [pytest.mark.browser, pytest.mark.slow]

HOSTILE = (
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    "</script><!-- --> &lt;b&gt; \u202egnp.exe\u202c zero\u200bwidth \u2066isolate\u2069 \x1b[31m \x00 half \u2028 line"
)


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


SHOWN = """() => [...document.querySelectorAll('.ex')].map((box) => ({
  place: box.closest('.row').querySelector('h3').children[0].textContent,
  tokens: [...box.querySelectorAll('.t')].map((span) => {
    const known = Object.fromEntries(facts(box.example, span.token));
    return [Number(known.id), Number(known.label), span.closest('mark.tr') !== null, known.owner];
  }),
}))"""


def press(button):
    """Click a button by an event: rows that are drawn while scrolling would move it away from the mouse."""
    button.dispatch_event("click")


def everything(page):
    found = page.evaluate(SHOWN)
    while page.is_enabled("#next"):
        press(page.locator("#next"))
        page.wait_for_selector("#list[data-ready]", state="attached")
        found += page.evaluate(SHOWN)
    return found


def documents(built):
    """Return the documents of a build as `datasets` reads them: file and line, ids, labels."""
    import pyarrow.parquet as pq

    found = []
    for split, rows in datasets.load_from_disk(str(built)).items():
        told = iter(pq.read_table(built / split / "provenance.parquet").to_pylist())
        for row in rows:
            at = 0
            for length in row["seq_lengths"]:
                one = next(told)
                place = f"{one['source']}:{one['line']}"
                found.append((place, row["input_ids"][at : at + length], row["labels"][at : at + length]))
                at += length
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    chance = random.Random(6)
    rows = []
    for number in range(120):
        messages = [{"role": "system", "content": "Be brief. 請簡短"}] if number % 3 == 0 else []
        for turn in range(chance.choice((1, 2))):
            words = " ".join(
                chance.choice(("naïve", "年號", "👩‍👩‍👧", "plain", "e\u0301tude", "x = 1\n\ty"))
                for _ in range(chance.randrange(2, 30))
            )
            messages += [{"role": "user", "content": f"{number}.{turn}?"}, {"role": "assistant", "content": words}]
        rows.append({"messages": messages, "id": f"row-{number}"})
    rows.append(talk("q", ""))
    path = tmp_path_factory.mktemp("page") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def tokenizer(tokenizer_dir):
    return tokenizer_dir("qwen")


def test_page_of_a_build_shows_its_tokens_and_labels(data, tokenizer, opened, tmp_path):
    build_sft_dataset(
        str(data),
        tokenizer,
        output_dir=tmp_path / "built",
        max_length=200,
        packing="bfd",
        test_size=0.1,
        overlong="truncate",
        on_bad_rows="quarantine",
        max_rejects=9,
    )
    preview(tmp_path / "built", html=tmp_path / "page.html", n=1000)
    page = opened(tmp_path / "page.html")
    shown = [(one["place"], [t[0] for t in one["tokens"]], [t[1] for t in one["tokens"]]) for one in everything(page)]
    assert shown == documents(tmp_path / "built")
    assert all((label != -100) == marked for one in everything(page) for _, label, marked, _ in one["tokens"])
    assert page.inner_text("#packs summary").startswith("Packs ")
    page.click("a[href='#packs']")
    assert page.locator(".pack").count() == len(datasets.load_from_disk(str(tmp_path / "built"))["train"])
    assert "empty_answer" in page.inner_text("#rejected summary")
    assert page.faults == []


def test_page_of_data_equals_its_build(data, tokenizer, opened, tmp_path):
    options = {"max_length": 200, "overlong": "truncate", "packing": "bfd"}
    build_sft_dataset(
        str(data), tokenizer, output_dir=tmp_path / "built", **options, on_bad_rows="quarantine", max_rejects=9
    )
    preview(str(data), tokenizer, html=tmp_path / "page.html", n=1000, **options)
    page = opened(tmp_path / "page.html")
    told = everything(page)
    shown = sorted((one["place"], [t[0] for t in one["tokens"]], [t[1] for t in one["tokens"]]) for one in told)
    assert shown == sorted(documents(tmp_path / "built"))
    owners = {owner for one in told for *_, owner in one["tokens"]}
    assert {
        "the template",
        "user, messages[0], content",
        "system, messages[0], content",
        "assistant, messages[1], content",
    } <= owners
    assert page.locator(".pack").count() == len(datasets.load_from_disk(str(tmp_path / "built"))["train"])


def test_page_shows_the_text_of_each_token(data, tokenizer, opened, tmp_path):
    """Also for characters of several code units and characters of several tokens."""
    shown = preview(str(data), tokenizer, n=40, html=tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    texts = page.evaluate(
        "data.rows.flatMap((row) => row.examples.map((one) => [...one.ends].map((end, at) => one.text.slice(at ? one.ends[at - 1] : 0, end))))"
    )
    expected = [view.pieces for row in shown.rows for view in row.examples]
    assert texts == expected


def test_hostile_rows_are_escaped(simple):
    page = simple([talk(HOSTILE, HOSTILE), {"messages": HOSTILE}, talk("q", "")])
    assert not page.title().startswith("taken")
    assert page.locator("#list script, #list img, #list b").count() == 0
    assert page.evaluate("data.rows[0].examples[0].text").count(HOSTILE) == 2
    seen = page.text_content(".ex")
    assert "<script>document.title='taken'</script>" in seen
    # What would turn or hide its neighbours is shown by its number.
    assert not set(seen) & set("\u202e\u202c\u200b\u2066\u2069\x1b\x00\u2028")
    assert {"U+202E", "U+200B", "U+2066", "U+001B", "U+0000", "U+2028"} <= set(page.locator(".inv").all_text_contents())
    assert page.faults == []
    assert [url for url in page.asked if not url.startswith("file:")] == []


def test_content_security_policy_blocks_other_scripts(simple):
    page = simple([talk("q", "a")])
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'document.title = 1'}))"
    )
    assert page.title() != "1"
    assert any("Content Security Policy" in fault for fault in page.faults)


def test_hostile_file_names_are_escaped(tmp_path, opened):
    path = tmp_path / "a\"><script>document.title='taken'</script>.jsonl".replace("/", "∕")
    path.write_text(json.dumps(talk("q", "a")) + "\n{broken\n")
    preview(path, tiny_bpe(tmp_path / "t"), html=tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    assert "taken" not in page.evaluate("document.title").split("'")[0]
    assert page.title() == path.name
    assert str(path) in page.inner_text(".facts")
    assert page.get_attribute(".row a", "href") == f"{path.as_uri()}#L1"
    assert page.locator("#rejected td a").first.text_content() == f"{path}:2"


def test_search_finds_and_highlights_matches(simple):
    page = simple(
        [talk("Where is the quick fox?", "the QUICK brown fox"), talk("quick", "slow"), talk("another", "thing")]
    )
    page.keyboard.press("/")
    page.keyboard.type("quick")
    assert page.inner_text("#status").startswith("3 found in 2 of 3 rows")
    page.wait_for_selector("#list[data-ready]", state="attached")
    assert [
        text.strip().lower() for text in page.locator(".row").first.locator(".hit").all_text_contents() if text.strip()
    ]
    assert (
        "".join(page.locator(".row").first.locator(".hit").all_text_contents()).lower().replace(" ", "").count("quick")
        == 2
    )
    page.select_option("#in", "trained")
    assert page.inner_text("#status").startswith("1 found in 1 of 3 rows")
    page.select_option("#in", "prompt")
    assert page.inner_text("#status").startswith("2 found in 2 of 3 rows")
    page.select_option("#in", "all")
    page.fill("#q", "/qui[ck]+ (b|f)/")
    assert "press Enter" in page.inner_text("#status")
    page.keyboard.press("Enter")
    assert page.inner_text("#status").startswith("1 found in 1 of 3 rows")
    page.fill("#q", "/(/")
    page.keyboard.press("Enter")
    assert page.inner_text("#status").startswith("invalid regular expression")
    page.fill("#q", "nowhere")
    assert page.inner_text("#status").startswith("0 found in 0 of 3 rows")
    assert page.locator(".row").count() == 0
    page.fill("#q", "")
    assert page.locator(".row").count() == 3
    assert page.faults == []


def test_rows_can_be_filtered_and_sorted(simple):
    rows = [talk("q", "a" * (40 - 10 * n)) for n in range(3)] + [talk("<|im_end|>", "a"), talk("q", "")]
    page = simple(rows)
    names = lambda: [re.match(r"row \d+", text).group() for text in page.locator(".row h3").all_text_contents()]
    page.select_option("#order", "short")
    shortest = names()
    page.select_option("#order", "long")
    assert names()[:-1] == shortest[1:][::-1]
    page.select_option("#order", "")
    options = page.locator("#kind option").all_text_contents()
    assert {"all rows", "control_tokens (1)", "rejected (1)", "shortest (1)"} <= set(options)
    page.select_option("#kind", "rejected")
    assert names() == ["row 4"]
    assert "empty_answer" in page.text_content(".row")


def test_tooltip_describes_the_token(simple):
    page = simple([talk("where", "here")])
    stop = page.locator("#list .t.s")
    stop.hover()
    tip = page.inner_text("#tip")
    assert re.search(r"id\s+2\n", tip)
    assert re.search(r"piece\s+<\|im_end\|>", tip)
    assert re.search(r"label\s+2\b", tip)
    assert "stop token" in tip
    page.locator(".o[data-role=user] .t").first.hover()
    assert re.search(r"owner\s+user, messages\[0\], content", page.inner_text("#tip"))
    assert re.search(r"label\s+-100", page.inner_text("#tip"))
    page.mouse.move(5, 5)
    assert page.is_hidden("#tip")


def test_page_is_usable_with_the_keyboard(simple):
    page = simple([talk(f"question {n}", "an answer") for n in range(60)])
    for _ in range(2):
        page.keyboard.press("j")
    assert page.evaluate("document.activeElement.closest('.row').id") == "row-1"
    page.keyboard.press("k")
    assert page.evaluate("document.activeElement.closest('.row').id") == "row-0"
    page.keyboard.press("ArrowRight")
    assert "token 0 of" in page.inner_text("#announcement")
    page.keyboard.press("End")
    assert page.evaluate("state.cursor.token") == page.evaluate("data.rows[0].examples[0].ends.length - 1")
    page.keyboard.press("ArrowLeft")
    assert "label 2" in page.inner_text("#announcement")
    page.keyboard.press("]")
    assert page.inner_text("#page") == "page 2 of 3"
    page.keyboard.press("[")
    page.keyboard.press("b")
    assert page.is_checked("#borders")
    for close in ("?", "Escape"):
        place = page.evaluate("scrollY")
        page.keyboard.press("?")
        assert page.is_visible("#help h2")
        page.keyboard.press("j")  # the rows behind the list do not move
        assert page.evaluate("scrollY") == place
        page.keyboard.press(close)
        assert page.is_hidden("#help")
    page.click("#help-open")
    page.click("#help-close")
    assert page.is_hidden("#help")
    page.keyboard.press("/")
    page.keyboard.type("jk?")
    assert page.input_value("#q") == "jk?"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement === document.body")
    assert page.faults == []


def test_search_ignores_case(simple):
    page = simple([talk("Straße İstanbul HELLO", "Hello ΣΑΣ Привет"), talk("hello", "x")])
    for text, rows in (
        ("hello", 2),
        ("HELLO", 2),
        ("привет", 1),
        ("straße", 1),
        ("σας", 1),
        ("i\u0307stanbul", 0),
        ("stanbul", 1),
    ):
        page.fill("#q", text)
        assert f"in {rows} of 2 rows" in page.inner_text("#status"), text


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [("/^and/", 1), ("/HELLO/", 0), ("/hello/i", 1), (r"/\-/", 1), ("/data/", 0), ("/(?=hello)/", 1)],
)
def test_search_supports_regular_expressions(simple, pattern, rows):
    page = simple([talk("one line\nand another", "a - b"), talk("hello", "x")])
    page.fill("#q", pattern)
    page.keyboard.press("Enter")
    assert f"in {rows} of 2 rows" in page.inner_text("#status")


def test_search_covers_rejects_and_notes(simple):
    page = simple(
        [
            talk("q", ""),
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": "a", "reasoning_content": "hid\u202eden"},
                ]
            },
        ]
    )
    page.fill("#q", "empty_answer")
    assert "1 found in 1 of 2 rows" in page.inner_text("#status")
    page.fill("#q", "hid")
    assert "1 found in 1 of 2 rows" in page.inner_text("#status")
    assert "U+202E" in page.text_content(".note.flag")


def test_packs_of_a_build_link_to_their_examples(opened, tmp_path):
    long = {"messages": [part for n in range(4) for part in talk(f"q{n}", f"a{n} " * (1 + 9 * n))["messages"]]}
    rows = [long, talk("q", "a"), talk("r", "b " * 9)]
    build_sft_dataset(
        rows, tiny_bpe(tmp_path / "t"), output_dir=tmp_path / "built", turns="split", packing="bfd", max_length=200
    )
    preview(tmp_path / "built", html=tmp_path / "page.html")
    page = opened(tmp_path / "page.html")
    page.click("a[href='#packs']")
    for part in page.locator(".doc.here").all():
        tokens = re.search(r": ([0-9,]+) tokens", part.get_attribute("title")).group(1)
        press(part)
        assert f"of {tokens} tokens trained" in page.text_content(f"#{page.evaluate('document.activeElement.id')}")
    assert "3 rows read" in " ".join(page.inner_text(".cards li >> nth=0").split())
    page.click("a[href='#options']")
    assert json.loads((tmp_path / "built" / "manifest.json").read_text())["fingerprint"] in page.inner_text("#options")
    assert "turns" in page.inner_text("#options")


def test_other_files_are_not_overwritten(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    for _ in range(2):
        preview([talk("q", "a")], html=tmp_path / "page.html")
    with pytest.raises(UsageError, match="is not an HTML page of ftdata"):
        preview([talk("q", "a")], html=tmp_path / "data.json")
    assert (tmp_path / "data.json").read_text() == "[]"


def test_documents_of_a_pack_link_to_their_rows(simple):
    page = simple([talk(f"question {n}", "an answer") for n in range(60)], packing="bfd", max_length=200)
    page.click("a[href='#packs']")
    part = page.locator(".doc.here").nth(40)
    number = re.search(r"\[(\d+)\]", part.get_attribute("title")).group(1)
    press(part)
    assert f"row {number}" in page.text_content(f"#{page.evaluate('document.activeElement.id')} h3")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_has_no_accessibility_violations(simple, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = simple(
        [talk("q", "an answer"), talk("<|im_end|>", "a"), talk("q", ""), talk("q", "long " * 90)],
        packing="bfd",
        max_length=80,
    )
    page.emulate_media(color_scheme=scheme)
    page.reload()
    page.wait_for_selector("#list[data-ready]", state="attached")
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    violations = Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in violations] == []


def test_effect_of_max_length_is_shown(simple):
    rows = [talk("q", "short"), talk("q", "word " * 100), talk("q", "word " * 200)]
    page = simple(rows, max_length=60, overlong="truncate")
    said = page.inner_text("#lengths p")
    assert "2 examples longer than max_length 60 (overlong=truncate): 2 truncated, 0 left out (0 rows" in said
    assert "2 answers truncated, 0 removed completely." in said
    assert "max_length 60: 2 longer" in page.text_content("#lengths svg")
    assert page.locator(".cut").count() == 3  # one is in the legend
    assert "tokens cut" in page.locator(".row").nth(1).text_content()


def test_long_rows_and_many_rows_are_shown_completely(simple):
    """More than 100,000 tokens in one row, and 300 short rows."""
    page = simple(
        [talk("q", "abcdefgh ijkl\n" * 9000)] + [talk(f"q{n}", "an answer of some words") for n in range(300)]
    )
    size = page.evaluate("data.rows[0].examples[0].ends.length")
    assert page.locator(".ex").first.locator(".t").count() == 100_000 < size
    press(page.locator(".ex button"))
    page.wait_for_selector("#list[data-ready]", state="attached")
    assert page.locator(".ex").first.locator(".t").count() == size
    assert page.inner_text("#page") == "page 1 of 13"
    page.fill("#q", "q299")
    assert page.inner_text("#status").startswith("1 found in 1 of")


def test_notebook_shows_rows_without_scripts(opened, tmp_path):
    shown = preview(
        [talk(HOSTILE, "an answer <b>bold</b>")], tiny_bpe(tmp_path / "t", template=CHATML), n=1
    )._repr_html_()
    (tmp_path / "cell.html").write_text(f"<!doctype html><meta charset=utf-8><div id=list data-ready></div>{shown}")
    page = opened(tmp_path / "cell.html")
    assert page.locator("script, img, b b").count() == 0
    assert page.inner_text("mark") == "an answer <b>bold</b><|im_end|>"
    assert "<script>" in page.inner_text("pre")
    assert page.title() != "taken"


@pytest.mark.long
def test_docs_images_can_be_regenerated(tmp_path):
    """`python docs/scripts/inspect_images.py` writes exactly the images that the docs use."""
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, root / "docs" / "scripts" / "inspect_images.py", tmp_path / "images"],
        check=True,
        capture_output=True,
    )
    made = {path.name: path.stat().st_size for path in (tmp_path / "images").iterdir()}
    assert set(made) == {path.name for path in (root / "docs" / "inspect").iterdir()}
    named = set(re.findall(r"\(inspect/([\w.-]+)\)", (root / "docs" / "inspect.md").read_text()))
    assert named == set(made)
    assert min(made.values()) > 2000
    assert all("@font-face" not in path.read_text() for path in (tmp_path / "images").glob("*.svg"))
