"""Inference with a finished run: evaluation, generation, chat and merging."""

import json
import math
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import yaml

from ftdata import build_sft_dataset
from ftdata.config import load_config
from ftdata.errors import InputRefused, UsageError
from ftdata.pipeline.recipe import make_recipe

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import torch  # noqa: E402
import transformers as hf  # noqa: E402

from ftdata.train import compare, generate, merge, run, start_chat  # noqa: E402

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ASKED = ["Write {} as a word.", "Spell {}.", "{}?", "What is {} in words?"]
TASK = [
    {"question": ask.format(n), "answer": f"It is written {word}, as a word."}
    for n, word in enumerate(NUMBERS)
    for ask in ASKED
]
QUICK = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "numbers.jsonl", TASK)


@pytest.fixture(scope="module")
def learnt(llama, data, tmp_path_factory):
    """A run that learns to write numbers as words, with some ways of asking held out."""
    folder = tmp_path_factory.mktemp("runs") / "learnt"
    settings = {
        "num_train_epochs": 30,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "eval_strategy": "steps",
    }
    settings |= {"eval_steps": 30, "save_steps": 30, "save_strategy": "steps", "logging_steps": 5}
    return run(data, model=llama, output_dir=folder, test_size=8, early_stopping=20, settings=settings, samples=2)


def test_tuned_model_is_better_than_the_base_model(learnt):
    found = compare(learnt, n=None, max_new_tokens=40)
    assert found.data_name.startswith("the test split")
    assert len(found.rows) == 8
    assert found.tuned.exact > found.base.exact + 0.4
    assert found.tuned.bleu > found.base.bleu + 20
    assert found.tuned.chrf > found.base.chrf + 20
    assert found.tuned.perplexity < found.base.perplexity / 10
    about = json.loads((learnt / "run.json").read_text())
    assert math.isclose(found.tuned.perplexity, about["perplexity"], rel_tol=1e-4)


def test_beam_search_and_sampling_are_supported(learnt):
    beams = compare(learnt, n=3, num_beams=3, early_stopping=True, max_new_tokens=40)
    assert beams.tuned.exact > beams.base.exact
    one, again, other = (
        compare(learnt, n=3, do_sample=True, temperature=5.0, max_new_tokens=8, seed=seed).rows for seed in (1, 1, 2)
    )
    assert one == again != other
    with pytest.raises(UsageError, match="model.generate rejects"):
        compare(learnt, n=1, num_beems=3)


def test_batched_answers_equal_single_answers(learnt):
    """Left padding and prompts of different lengths do not change the answers."""
    together = compare(learnt, n=6, batch_size=6, max_new_tokens=8)
    alone = compare(learnt, n=6, batch_size=1, max_new_tokens=8)
    assert together.rows == alone.rows


class Cells(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.cells, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        if self.cells:
            self.cells[-1] += data


def test_comparison_is_written_as_json_and_html(training_python, learnt, tmp_path):
    done = subprocess.run(
        training_python("-m", "ftdata", "eval", learnt, "-n", 2, "--html", tmp_path / "e.html", "--json"),
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["tuned"].keys() == {"perplexity", "exact", "bleu", "chrf"}
    cells = Cells((tmp_path / "e.html").read_text()).cells
    for row in found["rows"]:
        assert all(any(text.strip() == cell.strip() for cell in cells) for text in (row["prompt"], row["tuned"]))


@pytest.mark.parametrize("width", [200, 80])
def test_answers_are_below_each_other_on_a_narrow_terminal(width):
    from rich.console import Console

    from ftdata.train.inference.comparison_report import ComparedAnswer, Comparison, Scores

    scores = Scores(1.0, 0.0, 0.0, 0.0)
    answer = "We are open Monday to Friday from 9 am to 6 pm."
    rows = (ComparedAnswer("When are you open?", answer, "When are you open?", answer),)
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        Comparison("data", "base", "tuned", scores, scores, rows).print(console)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert f"expected  {answer}" in [line.rstrip() for line in lines] or width == 200
    assert sum(answer in line for line in lines) == (2 if width == 80 else 1)
    assert any("1 row of data" in line for line in lines)


@pytest.mark.parametrize("width", [200, 80])
def test_hostile_answers_are_escaped_in_terminal_and_html(width):
    from rich.console import Console

    from ftdata.train.inference.comparison_report import ComparedAnswer, Comparison, Scores

    hostile = "\x1b[31m<script>alert(1)</script>[bold]\u202e"
    scores = Scores(1.0, 0.0, 0.0, 0.0)
    report = Comparison(
        hostile, hostile, hostile, scores, scores, (ComparedAnswer(hostile, hostile, hostile, hostile),)
    )
    assert "script" not in Cells(report.as_html()).tags
    console = Console(width=width, force_terminal=True, color_system=None)
    with console.capture() as capture:
        report.print(console)
    assert "\x1b[31m" not in capture.get()
    assert "\u202e" not in capture.get()


def test_chat_keeps_its_history_and_generate_answers(training_python, learnt):
    assert generate(learnt, ["Spell 3.", "Spell 5."], max_new_tokens=8) != generate(
        learnt, ["Spell 3.", "Spell 5."], base=True, max_new_tokens=8
    )
    talk = start_chat(learnt, max_new_tokens=4)
    first = talk.say("Spell 3.")
    talk.say("And 4?")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[1]["content"] == first
    done = subprocess.run(
        training_python("-m", "ftdata", "chat", learnt, "--max-new-tokens", 4),
        input="Spell 3.\n/new\nSpell 3.\n",
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [first, first]


def test_temperature_zero_is_greedy_and_invalid_top_p_is_refused(training_python, learnt):
    command = training_python("-m", "ftdata", "generate", learnt, "Spell 3.", "--max-new-tokens", 12)
    said = {
        tuple(options): subprocess.run([*command, *options], check=False, capture_output=True, text=True)
        for options in ([], ["--temperature", "0"], ["--top-p", "2"])
    }
    plain, cold, wrong = said.values()
    assert plain.stdout == cold.stdout != ""
    assert wrong.returncode == 2


def test_chat_continues_after_an_empty_answer_and_with_single_question_templates(llama, data, tmp_path):
    from ftdata.train.inference.chat import ChatSession

    folder = run(data, model=llama, output_dir=tmp_path / "run", template="question_answer", settings=QUICK)
    talk = start_chat(folder, max_new_tokens=2)
    talk.say("Spell 3.")
    assert not talk.is_single_turn
    talk.say("Spell 4.")
    assert talk.is_single_turn
    assert len(talk.messages) == 4
    chats = ChatSession(talk.model, make_recipe(llama), {"max_new_tokens": 2})
    chats.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    chats.say("b")
    assert not chats.is_single_turn


def test_prompts_are_encoded_as_in_training_for_every_template(llama):
    from ftdata.train.inference.prompts import encode_messages, read_documents, rebuild_recipe, split_last_turn

    said = [{"role": "user", "content": "Spell 3."}]
    rows = {
        None: {"messages": [*said, {"role": "assistant", "content": "three"}]},
        "question_answer": {"question": "Spell 3.", "answer": "three"},
        "alpaca": {"instruction": "Spell 3.", "output": "three"},
        "{{ prompt }} = {% generation %}{{ completion }}{{ eos_token }}{% endgeneration %}": {
            "prompt": "Spell 3.",
            "completion": "three",
        },
    }
    for template, row in rows.items():
        built = build_sft_dataset([row], llama, template)
        ((ids, labels, _),) = read_documents(built["train"])
        recipe = rebuild_recipe(llama, built.report.options)
        assert encode_messages(said, recipe) == split_last_turn(ids, labels, set())[0], template


def test_changed_base_model_is_refused(llama, data, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    folder = run(data, model=str(tmp_path / "model"), output_dir=tmp_path / "run", lora={"r": 4}, settings=QUICK)
    base = hf.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        base.lm_head.weight.mul_(1.5)
    base.save_pretrained(tmp_path / "model")
    for call in (compare, lambda run: merge(run, tmp_path / "merged"), lambda run: generate(run, ["a"])):
        with pytest.raises(InputRefused, match="base_model_differs"):
            call(folder)


def test_merged_model_works_without_peft(llama, data, tmp_path):
    for name, options in {"lora": {"lora": {"r": 4}}, "nf4": {"quantization": "nf4"}}.items():
        folder = run(
            data, model=llama, output_dir=tmp_path / name, settings={**QUICK, "learning_rate": 0.05}, **options
        )
        assert merge(folder, tmp_path / f"{name}-merged").error < 1e-4
        merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-merged")
        base = hf.AutoModelForCausalLM.from_pretrained(llama)
        assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
        assert merged.generation_config.eos_token_id == [2]
        assert hf.AutoTokenizer.from_pretrained(tmp_path / f"{name}-merged").chat_template
        with pytest.raises(UsageError, match="not empty"):
            merge(folder, tmp_path / f"{name}-merged")


def test_unfinished_or_damaged_runs_are_refused(learnt, tmp_path):
    for call in (compare, start_chat):
        with pytest.raises(UsageError, match="contains no finished run"):
            call(tmp_path)
    with pytest.raises(UsageError, match="no adapter to merge"):
        merge(learnt, tmp_path / "merged")
    shutil.copytree(learnt, tmp_path / "damaged")
    (tmp_path / "damaged" / "model" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputRefused, match="cannot be loaded"):
        start_chat(tmp_path / "damaged")


def test_answers_end_at_the_last_position_of_the_model(learnt):
    with pytest.raises(InputRefused, match="prompt_too_long"):
        generate(learnt, ["a" * 700])
    assert generate(learnt, ["a" * 480], max_new_tokens=200)


def test_run_directory_contains_everything_to_use_and_repeat_the_run(learnt, llama, tmp_path):
    assert {path.name for path in learnt.iterdir()} >= {
        "config.yaml",
        "run.json",
        "samples.jsonl",
        "loss.png",
        "loss.svg",
    }
    assert not list((learnt / "model").glob("*.bin"))
    samples = [json.loads(line) for line in (learnt / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} == {sample["prompt"] for sample in samples[:2]}
    assert len({sample["step"] for sample in samples}) > 1
    assert any(word in samples[0]["expected"] for word in NUMBERS)
    card = (learnt / "model" / "README.md").read_text()
    about = json.loads((learnt / "run.json").read_text())
    for said in (about["fingerprint"], "assistant", "test perplexity", f"{about['perplexity']:.3f}", "<\\|im_end\\|>"):
        assert said in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers"
    config = load_config(learnt / "config.yaml")
    assert config.model == llama
    assert load_config_text(card.split("```yaml\n")[1].split("```")[0], tmp_path) == config


def load_config_text(text, folder):
    (folder / "again.yaml").write_text(text)
    return load_config(folder / "again.yaml")
