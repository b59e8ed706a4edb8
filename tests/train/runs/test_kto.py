"""KTO on the labels of a build: the losses of TRL where its mask is right, exact resume, and a model that learns."""

import pytest
from cases import long
from preference_runs import CHATML_TRAINED_TO_THE_END as TEMPLATE
from preference_runs import (
    TRL_SETTINGS,
    as_messages,
    assert_equal_runs,
    copy_interrupted,
    make_words,
    read_run,
    write_rows,
)

from ftdata import build_preference_dataset
from ftdata.errors import UsageError

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import numpy as np  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import KTOConfig, KTOTrainer  # noqa: E402

from ftdata.train import compare, dry_run, run  # noqa: E402
from ftdata.train.runs.preference_trainers import KTORunTrainer, LabelCollator  # noqa: E402

SETTINGS = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}


def make_rows(count):
    """Return answers that repeat the question; they are desirable if they begin with yes."""
    rows = [{"prompt": f"Say {word}", "completion": f"yes {word}", "label": True} for word in make_words(count)]
    for row in rows[::3]:
        row |= {"completion": row["completion"].replace("yes", "no"), "label": False}
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", make_rows(60))


@pytest.fixture(scope="module")
def trained(llama, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {"task": "kto", "test_size": 18, "lora": {"r": 4}}
    return run(data, model=llama, output_dir=folder, settings={**SETTINGS, "save_steps": 10}, **options)


@pytest.mark.parametrize(
    ("loss", "adapter"),
    [("kto", False), long("kto", True), long("apo_zero_unpaired", False), ("apo_zero_unpaired", True)],
)
def test_losses_equal_those_of_trl_where_its_mask_is_right(llama, tmp_path, adapter, loss):
    rows = make_rows(12)
    config = KTOConfig(str(tmp_path), **TRL_SETTINGS, loss_type=loss)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TEMPLATE
    messages = [*map(as_messages, rows)]
    built = build_preference_dataset(rows, llama, TEMPLATE, task="kto")["train"]
    own = {"data_collator": LabelCollator(tokenizer.pad_token_id), "seal": None}
    own |= {"max_checkpoints": None, "lengths": np.ones(12, int)}
    losses = []
    for kind, given, more in ((KTOTrainer, Dataset.from_list(messages), {}), (KTORunTrainer, built, own)):
        model = AutoModelForCausalLM.from_pretrained(llama)
        if adapter:
            from peft import LoraConfig

            more["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = kind(model=model, args=config, train_dataset=given, processing_class=tokenizer, **more)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != losses[0][-1]


def test_model_learns_the_difference_between_desirable_and_undesirable_answers(trained):
    about = read_run(trained)
    assert about["reward_margin"] > 0.1
    assert about["test_loss"] < 0.49
    assert "- kto" in (trained / "model" / "README.md").read_text()
    found = compare(trained, n=4, max_new_tokens=2)
    assert all(row.expected.startswith("yes") for row in found.rows)
    assert found.tuned.perplexity < found.base.perplexity


@pytest.mark.long  # the same code as in `test_preference.py`
def test_metrics_of_an_evaluation_are_means_over_rows(llama, data, tmp_path):
    """The last batch has fewer rows than the others, and some batches have only one kind of answer."""
    margins = []
    for size in (5, 18):
        settings = {**SETTINGS, "max_steps": 4, "per_device_eval_batch_size": size, "loss_type": "apo_zero_unpaired"}
        out = run(data, model=llama, output_dir=tmp_path / f"run{size}", settings=settings, task="kto",
                  test_size=18, lora={"r": 4})  # fmt: skip
        about = read_run(out)
        margins.append([about["test_loss"], about["reward_margin"]])
    assert margins[0] == pytest.approx(margins[1], rel=1e-3)


def test_resumed_run_equals_the_uninterrupted_run(trained, tmp_path):
    copy_interrupted(trained, tmp_path / "run")
    run(tmp_path / "run", resume=True)
    assert_equal_runs(trained, tmp_path / "run")


def test_answers_of_other_prompts_keep_their_masks(llama):
    """The batch for the divergence joins each prompt with the answer of the row before."""
    rows = build_preference_dataset(make_rows(3), llama, TEMPLATE, task="kto")["train"].to_list()
    batch = LabelCollator(0)(rows)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    for index, row in enumerate(rows):
        before = rows[index - 1]
        trained = batch["KL_completion_mask"][index].bool()
        assert batch["KL_input_ids"][index][trained].tolist() == [one for one in before["labels"] if one != -100]
        start = row["labels"].index(next(one for one in row["labels"] if one != -100))
        assert batch["KL_input_ids"][index][:start].tolist() == row["input_ids"][:start]
    assert "yes" in tokenizer.decode(batch["KL_input_ids"][0])
    assert batch["label"].tolist() == [False, True, True]


def test_settings_and_data_of_other_tasks_are_refused(llama, data, tmp_path):
    options = {"model": llama, "output_dir": str(tmp_path / "run"), "task": "kto"}
    with pytest.raises(UsageError, match="train.precompute_ref_log_probs cannot be set"):
        dry_run(data, settings={"precompute_ref_log_probs": True}, **options)
    with pytest.raises(UsageError, match="per_device_eval_batch_size is 1, expected at least 2"):
        dry_run(data, settings={"per_device_eval_batch_size": 1}, **options)
    for setting in ({"beta": -1}, {"metric_for_best_model": "accuracy"}):
        with pytest.raises(UsageError, match=next(iter(setting))):
            dry_run(data, settings=setting, **options)
    with pytest.raises(UsageError, match="data for task='kto' cannot be packed"):
        dry_run(data, packing="bfd", max_length=64, **options)


def test_margin_of_one_kind_of_label_cannot_select_the_best_model(llama, tmp_path):
    rows = [{"prompt": f"Say {word}", "completion": word, "label": True} for word in make_words(8)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {**SETTINGS, "metric_for_best_model": "rewards/margins", "load_best_model_at_end": True}
    with pytest.raises(UsageError, match="no_margin"):
        run(data, model=llama, output_dir=tmp_path / "run", settings=settings, test_size=2)


def test_prompts_with_other_answers_are_cut_to_the_limit_of_the_model(llama):
    rows = build_preference_dataset(make_rows(3), llama, TEMPLATE, task="kto")["train"].to_list()
    longest = max(len(row["input_ids"]) for row in rows)
    batch = LabelCollator(0, longest - 2)(rows)
    assert batch["KL_input_ids"].shape[1] == longest - 2
    assert batch["input_ids"].shape[1] == longest
