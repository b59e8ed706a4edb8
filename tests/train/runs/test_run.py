"""Training runs: estimates before, progress during, and reloading and evaluation after the training."""

import json
import math
import shutil
import subprocess

import pytest
from cases import long, mostly_long

from ftdata import build_sft_dataset
from ftdata.config import load_config, make_config, to_yaml
from ftdata.errors import InputRefused, InternalError, UsageError

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import torch  # noqa: E402
import transformers as hf  # noqa: E402
from conftest import tiny_model  # noqa: E402
from datasets import load_from_disk  # noqa: E402
from tokenizer_makers import tiny_bpe  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from ftdata.train import compare, dry_run, generate, init, run  # noqa: E402
from ftdata.train.model import estimate as before  # noqa: E402
from ftdata.train.model.isolation_probe import has_leaking_architecture  # noqa: E402
from ftdata.train.model.load import load_model  # noqa: E402
from ftdata.train.runs.train_model import make_trainer  # noqa: E402
from ftdata.train.runs.trainer_arguments import make_trainer_config  # noqa: E402

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ASKED = ["Write {} as a word.", "Spell {}.", "{}?", "What is {} in words?"]
TASK = [
    {"question": ask.format(n), "answer": f"It is written {word}, as a word."}
    for n, word in enumerate(NUMBERS)
    for ask in ASKED
]
QUICK = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
ISOLATED = ["llama", "gemma2", "gpt_neox", "phi", "qwen2", "qwen3"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "numbers.jsonl", TASK)


# During


def load_config_text(text, folder):
    (folder / "again.yaml").write_text(text)
    return load_config(folder / "again.yaml")


def test_early_stopping_keeps_the_best_model(llama, data, tmp_path):
    settings = {"num_train_epochs": 50, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2}
    settings |= {"learning_rate": 0.05, "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}
    folder = run(data, model=llama, output_dir=tmp_path / "run", test_size=8, early_stopping=2, settings=settings)
    about = json.loads((folder / "run.json").read_text())
    assert about["steps"] < 450
    assert about["best_step"] == about["steps"] - 4
    assert (folder / f"checkpoint-{about['best_step']}").is_dir()
    history = json.loads((folder / f"checkpoint-{about['steps']}" / "trainer_state.json").read_text())["log_history"]
    assert math.isclose(about["test_loss"], min(e["eval_loss"] for e in history if "eval_loss" in e), rel_tol=1e-6)
    with pytest.raises(UsageError, match="needs evaluations"):
        run(data, model=llama, output_dir=tmp_path / "none", early_stopping=2)


def test_nan_or_infinite_loss_stops_the_run(llama, data, tmp_path):
    with pytest.raises(InputRefused, match="diverged"):
        run(
            data,
            model=llama,
            output_dir=tmp_path / "run",
            settings={**QUICK, "max_steps": 30, "learning_rate": 1e30, "max_grad_norm": 0},
        )


def test_progress_display_shows_the_loss():
    from io import StringIO
    from types import SimpleNamespace

    from rich.console import Console

    from ftdata.train.runs.callbacks import TrainingProgressCallback

    seen = {}
    for terminal in (True, False):
        screen = StringIO()
        watch = TrainingProgressCallback(Console(file=screen, force_terminal=terminal, width=80, color_system=None))
        state = SimpleNamespace(max_steps=8, global_step=0, log_history=[])
        watch.on_train_begin(None, state, None)
        for step in range(1, 9):
            state.global_step = step
            watch.on_step_end(None, state, None)
            watch.on_log(None, state, None, logs={"loss": 8.0 - step, "num_tokens": 100 * step})
        watch.on_log(None, state, None, logs={"eval_loss": math.log(2), "eval_perplexity": 2.0})
        watch.on_train_end(None, state, None)
        seen[terminal] = screen.getvalue()
    assert "7.0000 █" in seen[True]
    assert "perplexity 2.000" in seen[True]
    assert "\x1b" not in seen[False]
    assert [line.split()[1] for line in seen[False].splitlines()] == [*(f"{step}/8" for step in range(1, 9)), "8/8"]
    assert "tokens/s" in seen[False]


def test_report_to_is_passed_through(llama, data, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run(data, model=llama, output_dir=tmp_path / "run", settings={**QUICK, "report_to": "tensorboard"})
    assert list((tmp_path / "board").glob("events*"))


# The hand-over


@pytest.mark.parametrize(
    "options",
    [
        long({"kind": "qwen3_moe"}, id="experts"),
        pytest.param({"kind": "qwen3_moe", "lora": {"r": 4}}, id="experts with an adapter"),
        pytest.param({"settings": {"label_smoothing_factor": 0.3}}, id="smoothed labels"),
        long({"settings": {"loss_type": "dft"}}, id="dft"),
    ],
)
def test_perplexity_excludes_auxiliary_losses(tiny, data, tmp_path, options):
    kind, settings = options.pop("kind", "llama"), {**QUICK, **options.pop("settings", {})}
    folder = run(data, model=tiny(kind), output_dir=tmp_path / "run", test_size=4, settings=settings, **options)
    found = compare(folder, n=None, max_new_tokens=2)
    about = json.loads((folder / "run.json").read_text())
    assert math.isclose(found.tuned.perplexity, about["perplexity"], rel_tol=1e-4)
    assert "output_router_logits" not in (folder / "config.yaml").read_text()
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1},
        long({"min_p": 0.1}),
        {"length_penalty": 0.8},
        long({"early_stopping": True}),
        long({"temperature": 0.6}),
    ],
)
def test_invalid_generation_config_of_the_base_model_is_accepted(llama, data, tmp_path, settings):
    shutil.copytree(llama, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    folder = run(data, model=str(tmp_path / "model"), output_dir=tmp_path / "run", settings={**QUICK, "max_steps": 1})
    assert generate(folder, ["3?"], max_new_tokens=2) == generate(folder, ["3?"], max_new_tokens=2)


def test_examples_longer_than_the_positions_of_the_model_are_refused(tiny, tmp_path):
    data = write(tmp_path / "long.jsonl", [{"question": "a" * 700, "answer": "b"}])
    for kind in ("llama", "opt"):
        for call in (run, dry_run):
            with pytest.raises(InputRefused, match=r"too_long.*max_length: 512"):
                call(data, model=tiny(kind), output_dir=tmp_path / "run")


def test_best_model_has_the_lowest_perplexity(llama, data, tmp_path):
    settings = {"num_train_epochs": 3, "learning_rate": 1e-3, "metric_for_best_model": "perplexity"}
    folder = run(data, model=llama, output_dir=tmp_path / "run", test_size=8, early_stopping=1, settings=settings)
    about = json.loads((folder / "run.json").read_text())
    assert about["best_step"] == about["steps"]


def test_new_embeddings_count_as_trained(llama, tmp_path):
    from tokenizers import Tokenizer

    shutil.copytree(llama, tmp_path / "model")
    backend = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    backend.add_special_tokens(["[NEW]", "[OTHER]"])
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    rows = write(tmp_path / "d.jsonl", [{"question": "a", "answer": "[NEW]"}] * 2)
    given = {"model": str(tmp_path / "model"), "lora": {"r": 4}, "control_tokens": "allow"}
    found, _ = dry_run(rows, output_dir=tmp_path / "run", **given)
    folder = run(rows, output_dir=tmp_path / "run", settings=QUICK, **given)
    base = hf.AutoModelForCausalLM.from_pretrained(llama)
    assert found.trainable > 2 * base.get_input_embeddings().weight.numel()
    scores = [compare(folder, n=1, max_new_tokens=1).base for _ in range(2)]
    assert scores[0] == scores[1]
    assert generate(folder, ["[OTHER]"], max_new_tokens=1)


@pytest.mark.parametrize("kind", mostly_long([*ISOLATED, "opt"], "gemma2", "gpt_neox", "opt"))
def test_models_of_every_class_train_and_can_be_reloaded(tiny, data, tmp_path, kind):
    packed = kind != "opt"
    options = {"packing": "bfd", "max_length": 128} if packed else {}
    folder = run(
        data, model=tiny(kind), output_dir=tmp_path / "run", lora={"r": 4}, test_size=4, settings=QUICK, **options
    )
    found = compare(folder, n=2, max_new_tokens=2)
    assert math.isfinite(found.tuned.perplexity)
    assert has_leaking_architecture(hf.AutoConfig.from_pretrained(tiny(kind))) is not packed


@pytest.mark.parametrize("kind", ISOLATED)
def test_packed_loss_equals_unpacked_loss(tiny, tmp_path, kind):
    """P9: the summed loss of all trained tokens, for each model class."""
    sums = []
    for options in ({"packing": "bfd", "max_length": 128}, {}):
        built = build_sft_dataset(TASK, tiny(kind), **options)
        config = make_config({"data": "d", "task": "sft", "model": tiny(kind), "output_dir": str(tmp_path)})
        trainer = make_trainer(config, load_model(tiny(kind)), built, isolated=True)
        loss, tokens = trainer.token_loss(built["train"])
        sums.append(loss * tokens)
    assert math.isclose(*sums, rel_tol=1e-4)


@pytest.mark.parametrize("isolated", [True, False], ids=["joined", "padded"])
def test_losses_equal_those_of_plain_trl(llama, tmp_path, isolated):
    built = build_sft_dataset(TASK, llama)
    settings = {**QUICK, "max_steps": 8, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    config = make_config({"data": "d", "task": "sft", "model": llama, "output_dir": str(tmp_path), "train": settings})
    ours = make_trainer(config, load_model(llama), built, isolated=isolated)
    plain = SFTTrainer(
        model=hf.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32),
        args=SFTConfig(
            output_dir=str(tmp_path / "plain"),
            max_length=None,
            use_cpu=True,
            bf16=False,
            report_to="none",
            activation_checkpointing=False,
            **{"learning_rate": 1e-3, **settings},
        ),
        train_dataset=built["train"].remove_columns("seq_lengths"),
        processing_class=hf.AutoTokenizer.from_pretrained(llama),
    )
    found = []
    for trainer in (ours, plain):
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(found[0]) == 8
    assert all(math.isclose(left, right, abs_tol=1e-5) for left, right in zip(*found, strict=True))


def test_batches_group_rows_by_length_and_start_with_the_longest(llama, tmp_path):
    rows = [{"question": "a " * (n % 37), "answer": "b"} for n in range(300)]
    built = build_sft_dataset(rows, llama)
    config = make_config(
        {
            "data": "d",
            "task": "sft",
            "model": llama,
            "output_dir": str(tmp_path),
            "train": {"per_device_train_batch_size": 4},
        }
    )
    trainer = make_trainer(config, load_model(llama), built, isolated=True)
    lengths = [len(row["input_ids"]) for row in built["train"]]
    epochs = []
    for epoch in (0, 1):
        trainer.state.epoch = float(epoch)
        epochs.append([batch["position_ids"].shape[1] for batch in trainer.get_train_dataloader()])
    sampler = trainer._get_train_sampler()
    order = list(sampler)
    assert sorted(order) == list(range(300))
    batches = [[lengths[number] for number in order[at : at + 4]] for at in range(0, 300, 4)]
    assert max(lengths) in batches[0]
    apart = sum(max(batch) - min(batch) for batch in batches) / len(batches)
    assert apart < 3
    assert sum(epochs[0]) == sum(epochs[1]) == sum(lengths)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("options", [long({}, id="full"), pytest.param({"lora": {"r": 4}}, id="lora")])
def test_bfloat16_run_can_be_reloaded(llama, data, tmp_path, options):
    folder = run(data, model=llama, output_dir=tmp_path / "run", settings={**QUICK, "bf16": True}, **options)
    assert compare(folder, n=1, max_new_tokens=2).rows


def test_saved_model_that_differs_after_reloading_is_an_error(llama, data, tmp_path, monkeypatch):
    from ftdata.train.inference import run_dir

    right = run_dir.load_tuned_model

    def wrong(*given, **how):
        model = right(*given, **how)
        with torch.no_grad():
            model.lm_head.weight.mul_(2)
        return model

    monkeypatch.setattr(run_dir, "load_tuned_model", wrong)
    with pytest.raises(InternalError, match="different logits"):
        run(data, model=llama, output_dir=tmp_path / "run", settings=QUICK)
    assert not json.loads((tmp_path / "run" / "run.json").read_text())["finished"]


# Before


def test_flops_of_pythia_equal_the_published_value():
    """2,195.7 GFLOP for 2,048 tokens and 4 accumulated batches on Pythia-70m, 0.28 GB of weights."""
    with torch.device("meta"):
        model = hf.GPTNeoXForCausalLM(
            hf.GPTNeoXConfig(
                vocab_size=50304, hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8
            )
        )
    assert round(6 * model.num_parameters(exclude_embeddings=True) * 2048 * 4 / 1e9, 1) == 2195.7
    assert (
        0.28
        < before._weight_bytes(model, make_config({"data": "", "model": "", "output_dir": ""}), torch.float32) / 1e9
        < 0.31
    )


@pytest.mark.parametrize(
    "options", [{}, long({"lora": {"r": 4}}), {"quantization": "nf4"}], ids=["full", "lora", "nf4"]
)
def test_estimate_equals_the_finished_run(llama, data, tmp_path, options):
    found, _ = dry_run(data, model=llama, output_dir=tmp_path / "run", max_length=64, packing="bfd", **options)
    assert not (tmp_path / "run").exists()
    folder = run(
        data,
        model=llama,
        output_dir=tmp_path / "run",
        max_length=64,
        packing="bfd",
        **options,
        settings={"save_strategy": "no"},
    )
    about = json.loads((folder / "run.json").read_text())
    assert about["steps"] == found.steps
    built = load_from_disk(str(folder / "data" / "train"))
    assert (found.rows, found.tokens) == (len(built), sum(map(len, built["input_ids"])))
    assert found.trained_tokens == sum(label != -100 for row in built["labels"] for label in row)
    model = load_model(llama, options.get("quantization"))
    adapters = 4 * found.trainable if options else 0
    assert math.isclose(found.weights - adapters, model.get_memory_footprint(), rel_tol=0.05)
    if options:
        saved = (folder / "model" / "adapter_model.safetensors").stat().st_size
        assert math.isclose(4 * found.trainable, saved, rel_tol=0.1)
    else:
        assert found.trainable == found.parameters == model.num_parameters()
    assert found.as_dict()["memory"] == found.memory
    assert f"{found.steps:,} steps" in str(found)


@pytest.mark.parametrize("kind", [*ISOLATED, "opt"])
def test_activation_memory_is_estimated_within_a_factor_of_two(tiny, kind):
    model = hf.AutoModelForCausalLM.from_pretrained(tiny(kind))
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    length = 256
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = model.train().base_model(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    assert held is not None
    found = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights) / length
    assert 0.5 < before._kept_per_token(model, torch.float32, length, recomputes=False) / found < 2


def test_run_that_does_not_fit_in_memory_is_refused_before_loading(llama, data, tmp_path, monkeypatch):
    monkeypatch.setattr(before.device, "free_memory", lambda: 100_000)
    for call in (run, dry_run):
        with pytest.raises(InputRefused, match=r"too_large.*Fix: quantization: nf4, or lora"):
            call(data, model=llama, output_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_leaking_attention_is_detected_without_weights(tiny, data, tmp_path):
    with pytest.raises(InputRefused, match="model_leaks"):
        dry_run(data, model=tiny("opt"), output_dir=tmp_path / "run", max_length=128, packing="bfd")
    _, [note] = dry_run(data, model=tiny("opt"), output_dir=tmp_path / "run")
    assert "padded" in note


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_init_writes_a_valid_training_configuration(tiny, data, tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = init(data, tiny(kind), "out")
    config = load_config_text(text, tmp_path)
    assert config.packing == ("bfd" if kind == "llama" else None)
    assert config.test_size == 4
    assert config.max_length >= max(len(row["input_ids"]) for row in build_sft_dataset(TASK, tiny(kind))["train"])
    assert dry_run(tmp_path / "again.yaml")[0].steps > 0
    assert all(
        line.startswith("#") for at, line in enumerate(text.splitlines()) if text.splitlines()[at - 1] == "" or at == 0
    )


def test_init_selects_a_template_and_quarantines_invalid_rows(tmp_path):
    model = tiny_model(tiny_bpe(tmp_path / "base", None, eos="</s>", bos=None))
    data = write(tmp_path / "d.jsonl", [*TASK, {"question": "x", "answer": ""}])
    config = load_config_text(init(data, model), tmp_path)
    assert config.template == "question_answer"
    assert (config.on_bad_rows, config.max_rejects) == ("quarantine", 1)
    (tmp_path / "r.yaml").write_text(to_yaml(config))
    assert run(tmp_path / "r.yaml", output_dir=tmp_path / "run", settings=QUICK)
    with pytest.raises(UsageError, match="standard input"):
        init("-", model)
    chats = write(
        tmp_path / "c.jsonl",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3,
    )
    assert load_config_text(init(chats, model), tmp_path).template == "zephyr"


def test_init_does_not_overwrite_files(training_python, llama, data, tmp_path):
    command = training_python("-m", "ftdata", "init", data, "-m", llama, "-o", tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("mine")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert (tmp_path / "run.yaml").read_text() == "mine"


def test_init_selects_a_new_run_directory(training_python, llama, data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run-2").write_text("")
    (tmp_path / "run-3").mkdir()
    command = training_python("-m", "ftdata", "init", data, "-m", llama)
    subprocess.run(command, check=True, cwd=tmp_path)
    assert load_config(tmp_path / "run.yaml").output_dir == "run-3"


def test_sections_and_flat_fields_are_equivalent(tmp_path):
    flat = {
        "train_on": "last_assistant",
        "turns": "split",
        "max_length": 64,
        "overlong": "drop_turns",
        "packing": "bfd",
    }
    common = {"data": "d", "task": "sft", "model": "m", "output_dir": "o"}
    grouped = {
        "mask": {"train_on": "last_assistant", "turns": "split"},
        "length": {"max_length": 64, "overlong": "drop_turns"},
        "pack": "bfd",
    }
    assert make_config({**common, **flat}) == make_config({**common, **grouped})
    (tmp_path / "c.yaml").write_text(to_yaml(make_config({**common, **grouped})))
    assert load_config(tmp_path / "c.yaml") == make_config({**common, **flat})
    assert make_config({**common, "length": 32}, max_length=64).max_length == 64
    for wrong, says in (
        ({"length": {"max_lenght": 3}}, "did you mean 'max_length'"),
        ({"length": 3, "max_length": 4}, "set twice"),
        ({"early_stopping": 0}, "at least 1"),
        ({"samples": -1}, "expected a number of prompts"),
    ):
        with pytest.raises(UsageError, match=says):
            make_config({**common, **wrong})


def test_trainer_settings_depend_on_device_and_data(llama, tmp_path):
    config = make_config({"data": "d", "task": "sft", "model": llama, "output_dir": str(tmp_path)})
    joined = make_trainer_config(config, isolated=True, packed=True, evaluates=False)
    padded = make_trainer_config(config, isolated=False, packed=False, evaluates=True)
    assert (joined.padding_free, str(joined.train_sampling_strategy)) == (True, "random")
    assert (padded.padding_free, padded.eval_strategy.value) == (False, "epoch")
    assert "group" in str(padded.train_sampling_strategy)
    assert padded.save_strategy.value == "epoch"
    settings = {"save_steps": 7, "eval_steps": 5}
    steps = make_config({"data": "d", "task": "sft", "model": llama, "output_dir": str(tmp_path), "train": settings})
    by_steps = make_trainer_config(steps, isolated=False, packed=False, evaluates=True)
    assert (by_steps.save_strategy.value, by_steps.save_steps) == ("steps", 7)
    assert (by_steps.eval_strategy.value, by_steps.eval_steps) == ("steps", 5)
    assert make_trainer_config(steps, isolated=False, packed=False, evaluates=False).eval_strategy.value == "no"
    assert joined.max_length is None
    assert (joined.bf16, joined.fp16) == ((True, False) if torch.cuda.is_available() else (False, False))
