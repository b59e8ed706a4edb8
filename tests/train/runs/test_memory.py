"""Memory while a run is reloaded and while two models are compared; progress of generation."""

import gc
import json
import subprocess
import weakref

import pytest
from cases import long

from ftdata.errors import InputRefused

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import torch  # noqa: E402
import transformers as hf  # noqa: E402

from ftdata.train import compare, generate, run  # noqa: E402
from ftdata.train.inference import (  # noqa: E402
    evaluation,
    run_dir,
)
from ftdata.train.inference.evaluation import _batches, perplexity  # noqa: E402
from ftdata.train.inference.generation import generate_ids as answered  # noqa: E402
from ftdata.train.inference.progress import GenerationStep, ProgressMeter  # noqa: E402
from ftdata.train.inference.prompts import Document  # noqa: E402
from ftdata.train.model.device import fit_threads  # noqa: E402
from ftdata.train.model.load import dequantize, load_model  # noqa: E402
from ftdata.train.runs import finish  # noqa: E402

QUICK = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
ROWS = [{"question": "a " * n + "?", "answer": f"It is {n}."} for n in range(8)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def full(llama, data, tmp_path_factory):
    return run(data, model=llama, output_dir=tmp_path_factory.mktemp("runs") / "full", settings=QUICK)


@pytest.fixture(scope="module")
def nf4(llama, data, tmp_path_factory):
    return run(
        data, model=llama, output_dir=tmp_path_factory.mktemp("runs") / "nf4", quantization="nf4", settings=QUICK
    )


@pytest.mark.parametrize(
    "options",
    [long({}), long({"lora": {"r": 4}}), {"quantization": "nf4"}, {"test_size": 2, "early_stopping": 1}],
    ids=["full", "lora", "nf4", "best model"],
)
def test_trained_model_is_freed_before_the_saved_model_is_reloaded(llama, data, tmp_path, monkeypatch, options):
    kept = {}
    read_back, check = finish._read_back, finish.check_reloads

    def remember(trainer, *rest):
        weights = list(trainer.model.parameters())
        states = [
            value for state in trainer.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        kept.update({f"weight {at}": weakref.ref(weight) for at, weight in enumerate(weights)})
        kept.update({f"state {at}": weakref.ref(state) for at, state in enumerate(states)})
        kept["optimizer"] = weakref.ref(trainer.optimizer)
        del weights, states
        return read_back(trainer, *rest)

    def look(*given):
        gc.collect()
        kept["alive"] = [name for name, one in kept.items() if one() is not None]
        return check(*given)

    monkeypatch.setattr(finish, "_read_back", remember)
    monkeypatch.setattr(finish, "check_reloads", look)
    run(data, model=llama, output_dir=tmp_path / "run", settings=QUICK, **options)
    assert len(kept) > 30
    assert kept["alive"] == []


def live_models():
    gc.collect()
    return sum(issubclass(type(one), hf.LlamaForCausalLM) for one in gc.get_objects())


@pytest.mark.parametrize("kind", [long("full"), "nf4"])
def test_one_model_is_in_memory_at_a_time_and_the_base_is_loaded_once(kind, request, monkeypatch):
    folder, loaded, living = request.getfixturevalue(kind), [], []
    load, ask, before = run_dir.load_model, evaluation.generate_ids, live_models()
    monkeypatch.setattr(
        run_dir, "load_model", lambda name, *given, **how: loaded.append(name) or load(name, *given, **how)
    )
    monkeypatch.setattr(
        evaluation, "generate_ids", lambda *given, **how: living.append(live_models() - before) or ask(*given, **how)
    )
    compare(folder, n=2, max_new_tokens=2)
    assert living == [1, 1]
    assert len(loaded) == (2 if kind == "full" else 1)


def test_four_bit_weights_are_dequantized_once_on_a_cpu(llama, nf4, monkeypatch):
    packed = load_model(llama, "nf4")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        right = packed(ids).logits
        numbers = dequantize(packed)
        assert type(numbers.model.layers[0].mlp.up_proj) is torch.nn.Linear
        assert torch.equal(numbers(ids).logits, right)
    fast = compare(nf4, n=4, max_new_tokens=4)
    monkeypatch.setattr(run_dir, "dequantize", lambda model: model)
    assert compare(nf4, n=4, max_new_tokens=4) == fast
    monkeypatch.setattr("ftdata.train.model.device.free_memory", lambda: 1000)
    packed = load_model(llama, "nf4")
    assert dequantize(packed) is packed
    assert type(packed.model.layers[0].mlp.up_proj) is not torch.nn.Linear


def test_perplexity_is_the_same_in_batches(llama):
    model = hf.AutoModelForCausalLM.from_pretrained(llama)
    texts = [
        Document(list(range(3, 3 + n)), [-100] * (n // 2) + list(range(3 + n // 2, 3 + n)))
        for n in (40, 7, 7, 90, 3, 12)
    ]
    alone = perplexity(model, texts, batch_size=1)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert perplexity(model, texts, batch_size=4) == pytest.approx(alone, rel=1e-5)
    assert len(calls) == 2
    batches = list(_batches([Document([1] * n, [1] * n) for n in (9000, 3000, 1000, 1000, 1000, 1000)], 16))
    assert batches == [[2, 3, 4, 5], [1], [0]]


# Progress


def test_progress_is_reported_for_every_token(llama):
    model = hf.AutoModelForCausalLM.from_pretrained(llama)
    model.generation_config.pad_token_id = 0
    steps = []
    answered(
        model, [[5] * n for n in (3, 4, 5)], batch_size=2, max_new_tokens=6, eos_token_id=None, progress=steps.append
    )
    assert [step.token for step in steps if not step.ended] == [1, 2, 3, 4, 5, 6] * 2
    assert [(step.batch, step.batches, step.answers) for step in steps if step.ended] == [(0, 2, 2), (1, 2, 3)]
    answered(model, [[5, 6]], max_new_tokens=4, num_beams=2, eos_token_id=None, progress=steps.append)
    assert steps[-1] == GenerationStep(0, 1, 4, 4, 1, ended=True)


def test_time_left_is_measured_on_the_first_tokens(monkeypatch):
    clock, shown = iter([0.0, 5.0, 6.0, 7.0, 8.0, 100.0]), []
    monkeypatch.setattr("ftdata.train.inference.progress.time.perf_counter", lambda: next(clock))
    meter = ProgressMeter(3, 2, shown.append)
    for token in (1, 2, 3):
        meter(GenerationStep(0, 1, token, 10, 0))
    assert [now.seconds_left for now in shown] == [None, 5.0 * 18, 3.0 * 17]
    meter(GenerationStep(0, 1, 3, 10, 3, ended=True))
    assert (shown[-1].answers, shown[-1].of_answers, shown[-1].steps, shown[-1].of_steps) == (3, 6, 10, 20)
    meter.next_model()
    meter(GenerationStep(0, 1, 1, 10, 0))
    assert shown[-1].seconds_per_step == 3.0


def test_comparison_reports_its_progress_completely(nf4):
    shown = []
    compare(nf4, n=3, max_new_tokens=5, batch_size=2, progress=shown.append)
    assert shown[0].steps == 1
    assert shown[-1].steps == shown[-1].of_steps == 2 * 2 * 5
    assert (shown[-1].answers, shown[-1].of_answers) == (6, 6)
    assert any(now.seconds_left for now in shown)
    shown.clear()
    generate(nf4, ["a", "b"], max_new_tokens=3, progress=shown.append)
    assert shown[-1].answers == 2


def test_slow_generation_is_announced_without_a_terminal(training_python, nf4):
    code = "import importlib; m = importlib.import_module('ftdata.cli.train'); m._ANNOUNCE_SECONDS = 0.0; import ftdata.cli; ftdata.cli.main()"
    options = ("eval", nf4, "-n", 2, "--max-new-tokens", 8, "--json")
    done = subprocess.run(training_python("-c", code, *options), check=True, capture_output=True, text=True)
    assert "4 answers take at most" in done.stderr
    assert "s per token" in done.stderr
    assert json.loads(done.stdout)["rows"]
    quick = subprocess.run(training_python("-m", "ftdata", *options), check=True, capture_output=True, text=True)
    assert "answers take" not in quick.stderr


# Threads


def test_fastest_number_of_threads_is_used(llama, monkeypatch):
    model = hf.AutoModelForCausalLM.from_pretrained(llama)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for seconds, chosen in (({4: 8.0, 2: 2.0, 1: 1.0}, 1), ({4: 8.0, 2: 2.0, 1: 3.0}, 2), ({4: 1.0, 2: 2.0}, 4)):
            monkeypatch.setattr(
                "ftdata.train.model.device._token_seconds", lambda _, seconds=seconds: seconds[torch.get_num_threads()]
            )
            with fit_threads(model):
                assert torch.get_num_threads() == chosen
            assert torch.get_num_threads() == 4
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
        with fit_threads(model):
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_changed_base_model_has_its_own_error_code(llama, data, tmp_path):
    import shutil

    shutil.copytree(llama, tmp_path / "model")
    folder = run(data, model=str(tmp_path / "model"), output_dir=tmp_path / "run", lora={"r": 4}, settings=QUICK)
    (tmp_path / "model" / "config.json").write_text((tmp_path / "model" / "config.json").read_text() + " ")
    with pytest.raises(InputRefused) as refused:
        run_dir.load_tuned_model(run_dir.open_run(folder))
    assert refused.value.code == "base_model_differs"
