"""DPO on the labels of a build: the losses of TRL where its mask is right, exact resume, and a model that learns."""

import shutil
import subprocess
import time

import pytest
from cases import long
from preference_runs import CHATML_TRAINED_TO_THE_END as TEMPLATE
from preference_runs import (
    TRL_SETTINGS,
    as_messages,
    assert_equal_runs,
    copy_interrupted,
    make_pairs,
    read_run,
    wait_until_unlocked,
    write_rows,
)

from ftdata import build_preference_dataset
from ftdata.build.dataset import write_build
from ftdata.build.remote import verify
from ftdata.config import load_config, make_config, to_yaml
from ftdata.errors import InputRefused, UsageError

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaModel  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from ftdata.train import compare, dry_run, generate, init, run  # noqa: E402
from ftdata.train.runs.preference_trainers import DPORunTrainer, PairCollator  # noqa: E402
from ftdata.train.runs.unpadding import run_without_padding  # noqa: E402

SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", make_pairs(48))


@pytest.fixture(scope="module")
def trained(llama, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {"task": "preference", "test_size": 16, "lora": {"r": 4, "dropout": 0.1}}
    settings = {**SETTINGS, "max_steps": 20, "save_steps": 5}
    return run(data, model=llama, output_dir=folder, settings=settings, **options)


@pytest.mark.parametrize(
    ("adapter", "padding_free"), [(False, False), long(False, True), long(True, False), (True, True)]
)
def test_losses_equal_those_of_trl_where_its_mask_is_right(llama, tmp_path, adapter, padding_free):
    rows = make_pairs(8)
    config = DPOConfig(str(tmp_path), **TRL_SETTINGS)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TEMPLATE
    messages = [*map(as_messages, rows)]
    built = build_preference_dataset(rows, llama, TEMPLATE, seed=0)["train"]
    losses = []
    for kind, data, more in (
        (DPOTrainer, Dataset.from_list(messages), {}),
        (DPORunTrainer, built, {"data_collator": PairCollator(tokenizer.pad_token_id)}),
    ):
        model = AutoModelForCausalLM.from_pretrained(llama)
        if kind is DPORunTrainer:
            more |= {"seal": None, "max_checkpoints": None, "lengths": torch.ones(8).numpy()}
        if adapter:
            from peft import LoraConfig

            more["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = kind(model=model, args=config, train_dataset=data, processing_class=tokenizer, **more)
        if kind is DPORunTrainer and padding_free:
            for part in filter(None, (trainer.model, trainer.ref_model)):
                run_without_padding(part.get_base_model() if adapter else part)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != losses[0][-1]


def test_model_prefers_the_chosen_answers_of_held_out_pairs(trained):
    about = read_run(trained)
    assert about["reward_accuracy"] == 1.0
    assert about["reward_margin"] > 0.1
    assert about["loss"][0] == pytest.approx(0.6931, abs=1e-3)
    assert about["loss"][-1] < 0.6
    assert "dpo" in (trained / "model" / "README.md").read_text()


def test_models_are_compared_on_both_sides(trained, data):
    """Prompts without pairs can be answered, too."""
    found = compare(trained, n=16, max_new_tokens=2)
    base, tuned = found.base, found.tuned
    assert tuned.rejected_perplexity / tuned.perplexity > base.rejected_perplexity / base.perplexity
    assert base.preferred <= tuned.preferred
    assert "chosen answer more likely" in {title for title, *_ in found.scores()}
    expected = [row["chosen"] for row in make_pairs(2)]
    given = compare(trained, data, n=2, max_new_tokens=2)
    assert ([row.expected for row in given.rows], given.tuned.preferred) == (expected, None)
    assert len(generate(trained, ["Say abcd"], max_new_tokens=2)) == 1


def test_resumed_run_equals_the_uninterrupted_run(trained, tmp_path):
    copy_interrupted(trained, tmp_path / "run")
    run(tmp_path / "run", resume=True)
    assert_equal_runs(trained, tmp_path / "run")


KILLED = """
import sys
from ftdata.train import run

run(**eval(sys.argv[1]))
"""


@pytest.mark.long  # `test_kto.py` and `test_reward.py` resume runs, and `test_resume.py` kills them
def test_killed_run_resumes_exactly_in_the_middle_of_an_epoch(training_python, trained, llama, data, tmp_path):
    """An epoch has 8 steps. The run is killed while it writes the checkpoint of step 10."""
    options = {"task": "preference", "test_size": 16, "lora": {"r": 4, "dropout": 0.1}}
    settings = {**SETTINGS, "max_steps": 20, "save_steps": 5}
    given = {"source": data, "model": llama, "output_dir": str(tmp_path / "run"), "settings": settings, **options}
    call = training_python("-c", KILLED, repr(given))
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "run" / "checkpoint-10").is_dir():
        time.sleep(0.01)
    process.kill()
    process.wait()
    wait_until_unlocked(tmp_path / "run")
    run(tmp_path / "run", resume=True)
    assert_equal_runs(trained, tmp_path / "run")


@pytest.mark.parametrize("precompute", [False, long(True)])
def test_full_fine_tuning_keeps_the_reference_model(llama, data, tmp_path, precompute):
    settings = {**SETTINGS, "precompute_ref_log_probs": precompute}
    out = run(data, model=llama, output_dir=tmp_path / "run", task="preference", settings=settings)
    losses = read_run(out)["loss"]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < 0.5


@pytest.mark.parametrize("setting", [{"beta": 0.5}, {"label_smoothing": 0.3}, {"precompute_ref_log_probs": True}])
def test_resume_with_another_objective_is_refused(trained, tmp_path, setting):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    with pytest.raises(InputRefused, match=f"train.{next(iter(setting))} was None"):
        run(folder, resume=True, settings=setting)


def test_reference_log_probabilities_are_computed_once_per_build(llama, data, tmp_path, monkeypatch):
    build = tmp_path / "built"
    write_build(data, llama, build, task="preference", test_size=4)
    computed, compute = [], DPORunTrainer.compute_ref_log_probs
    monkeypatch.setattr(DPORunTrainer, "compute_ref_log_probs", lambda *given: computed.append(1) or compute(*given))
    settings = {**SETTINGS, "max_steps": 2}
    plain = run(str(build), model=llama, output_dir=tmp_path / "plain", settings=settings)
    settings["precompute_ref_log_probs"] = True
    for name in ("first", "second"):
        counts = len(computed)
        out = run(str(build), model=llama, output_dir=tmp_path / name, settings=settings)
        assert read_run(out)["loss"] == pytest.approx(read_run(plain)["loss"], abs=1e-5)
        assert bool(len(computed) - counts) == (name == "first")
    assert len(list((build / "reference").iterdir())) == 2
    assert not verify(build)
    # The log-probabilities depend on these settings, but not on the adapter.
    first = []
    for name, changes, options in (
        ("alpha", {"ld_alpha": 0.5}, {}),
        ("adapter", {}, {"lora": {"r": 4}}),
        ("larger adapter", {}, {"lora": {"r": 8}}),
    ):
        counts = len(computed)
        out = run(str(build), model=llama, output_dir=tmp_path / name, settings={**settings, **changes}, **options)
        assert read_run(out)["loss"][0] == pytest.approx(0.6931, abs=1e-3)
        first.append(len(computed) > counts)
    assert first == [True, True, False]
    write_build(data, llama, build, task="preference", test_size=5, overwrite=True)
    assert not (build / "reference").exists()


def test_metrics_of_an_evaluation_are_means_over_pairs(llama, data, tmp_path):
    """The last batch has fewer pairs than the others."""
    scores = []
    for size in (5, 16):
        options = {"task": "preference", "test_size": 16, "lora": {"r": 4}}
        settings = {**SETTINGS, "per_device_eval_batch_size": size}
        out = run(data, model=llama, output_dir=tmp_path / f"run{size}", settings=settings, **options)
        about = read_run(out)
        scores.append([about[name] for name in ("test_loss", "reward_accuracy", "reward_margin")])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def test_tool_results_of_an_answer_are_not_trained(llama, data):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    sides = {
        name: [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "result"},
            {"role": "assistant", "content": answer},
        ]
        for name, answer in (("chosen", "two"), ("rejected", "three"))
    }
    sides["rejected"][1] = {"role": "assistant", "content": "Let me guess."}
    template = TEMPLATE.replace(
        "{{ message.content }}",
        "{{ message.content }}{% for c in message.tool_calls or [] %}{{ c | tojson }}{% endfor %}",
    )
    rows = build_preference_dataset([sides], llama, template)["train"].to_list()
    batch = PairCollator(0)(rows)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    chosen = tokenizer.decode(batch["input_ids"][0][batch["completion_mask"][0].bool()])
    assert "add" in chosen
    assert "two" in chosen
    assert "result" not in chosen
    assert batch["completion_mask"].sum() == sum(label != -100 for row in rows for side in ("chosen", "rejected")
                                                 for label in row[f"{side}_labels"])  # fmt: skip


def test_task_of_a_run_is_that_of_its_data(llama, data, tmp_path):
    """The task is detected in the data or in the build. A task that contradicts a build is refused."""
    build, options = str(tmp_path / "built"), {"model": llama, "settings": {"max_steps": 2}}
    write_build(data, llama, build)
    assert dry_run(data, output_dir=tmp_path / "run", **options)[0].examples == 48
    config = make_config({"data": build, "model": llama, "output_dir": str(tmp_path / "run"), "task": "dpo"})
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert dry_run(tmp_path / "run.yaml", settings={"max_steps": 2})[0].examples == 48
    for task in ("sft", "kto"):
        with pytest.raises(UsageError, match="already_built.*task"):
            dry_run(build, output_dir=tmp_path / "run", task=task, **options)


def test_init_writes_the_task(llama, data, tmp_path):
    (tmp_path / "run.yaml").write_text(init(data, llama, str(tmp_path / "run")))
    config = load_config(tmp_path / "run.yaml")
    assert (config.task, config.packing, config.train["learning_rate"]) == ("dpo", None, 1e-6)
    assert dry_run(tmp_path / "run.yaml")[0].steps > 0


def test_estimate_and_settings_of_pairs(llama, data, tmp_path):
    options = {"model": llama, "output_dir": str(tmp_path / "run"), "task": "preference"}
    full, _ = dry_run(data, settings={"max_steps": 2}, **options)
    without_reference, _ = dry_run(data, settings={"max_steps": 2, "precompute_ref_log_probs": True}, **options)
    assert full.weights == 2 * without_reference.weights
    assert full.examples == 48
    for setting, problem in (
        ({"betta": 1}, "DPOConfig has no field 'betta'.*did you mean 'beta'"),
        ({"metric_for_best_model": "perplexity"}, "unknown_metric_for_best_model"),
        ({"max_length": 10}, "train.max_length cannot be set"),
        ({"label_smoothing": 0.7}, "train.label_smoothing is 0.7, expected at least 0 and below 0.5"),
    ):
        with pytest.raises(UsageError, match=problem):
            dry_run(data, settings=setting, **options)


def test_batches_are_processed_without_padding(llama, data, tmp_path, monkeypatch):
    """The rows of a batch become one sequence, and each row has the same log-probabilities as alone."""
    shapes, forward = [], LlamaModel.forward

    def record(self, *args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", record)
    run(data, model=llama, output_dir=tmp_path / "run", task="dpo", settings={**SETTINGS, "max_steps": 1}, samples=0)
    # A padded batch of 4 pairs would have 8 rows. The trained model and the reference model see one row.
    assert 8 not in {rows for rows, _ in shapes}
    monkeypatch.undo()
    model = AutoModelForCausalLM.from_pretrained(llama)
    add_fused_lm_head(model)
    ids = torch.randint(3, 50, (3, 9))
    mask = torch.tensor([[1] * count + [0] * (9 - count) for count in (9, 2, 5)])
    labels = ids.masked_fill((mask == 0) | (torch.arange(9) < 1), -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "fused_lm_head": True}
    padded = model(**inputs).log_probs
    run_without_padding(model)
    assert torch.allclose(model(**inputs).log_probs, padded, atol=1e-5)


@pytest.mark.parametrize("task", ["dpo", long("kto")])
def test_full_fine_tuning_with_mixed_precision_is_saved_and_reloaded(llama, tmp_path, task):
    """Accelerate restores the forward method of the model after a training in bfloat16."""
    rows = make_pairs(8)
    if task == "kto":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    data = write_rows(tmp_path / "d.jsonl", rows)
    settings = {**SETTINGS, "max_steps": 2, "bf16": True}
    out = run(data, model=llama, output_dir=tmp_path / "run", task=task, settings=settings)
    assert read_run(out)["finished"]


def test_reference_log_probabilities_belong_to_the_data(llama, tmp_path):
    """A run that was interrupted before its first checkpoint can start again with other data."""
    settings = {**SETTINGS, "max_steps": 1, "precompute_ref_log_probs": True}
    rows = make_pairs(4)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    for number, given in enumerate((rows, swapped)):
        data = write_rows(tmp_path / f"{number}.jsonl", given)
        out = run(data, model=llama, output_dir=tmp_path / "run", task="dpo", settings=settings)
        assert read_run(out)["loss"][0] == pytest.approx(0.6931, abs=1e-3)
        for path in out.iterdir():
            if path.name == "data":
                shutil.rmtree(path / "train")
            else:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
