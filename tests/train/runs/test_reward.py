"""Reward models on the tokens of a build: the losses of TRL, a model that learns, and resumed runs."""

import pytest
from preference_runs import CHATML_TRAINED_TO_THE_END as TEMPLATE
from preference_runs import (
    TRL_SETTINGS,
    as_messages,
    assert_equal_runs,
    copy_interrupted,
    make_pairs,
    read_run,
    write_rows,
)

from ftdata import build_preference_dataset
from ftdata.build.dataset import write_build
from ftdata.errors import InputRefused, UsageError

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer  # noqa: E402
from trl import RewardConfig, RewardTrainer  # noqa: E402

from ftdata.train import compare, dry_run, merge, run, start_chat  # noqa: E402
from ftdata.train.runs.preference_trainers import PairCollator, RewardRunTrainer  # noqa: E402

SETTINGS = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", make_pairs(48))


@pytest.fixture(scope="module")
def trained(llama, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {"task": "reward", "test_size": 16, "lora": {"r": 4}}
    settings = {**SETTINGS, "save_steps": 10, "eval_steps": 10}
    return run(data, model=llama, output_dir=folder, settings=settings, **options)


def test_losses_equal_those_of_trl(llama, tmp_path):
    rows = make_pairs(8)
    config = RewardConfig(str(tmp_path), **TRL_SETTINGS)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = TEMPLATE
    messages = [*map(as_messages, rows)]
    built = build_preference_dataset(rows, llama, TEMPLATE, seed=0)["train"]
    own = {"data_collator": PairCollator(tokenizer.pad_token_id, for_rewards=True), "seal": None}
    own |= {"max_checkpoints": None, "lengths": np.ones(8, int)}
    losses = []
    for kind, given, more in ((RewardTrainer, Dataset.from_list(messages), {}), (RewardRunTrainer, built, own)):
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1)
        trainer = kind(model=model, args=config, train_dataset=given, processing_class=tokenizer, **more)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != losses[0][-1]


def test_model_prefers_the_chosen_answers_of_held_out_pairs(trained):
    about = read_run(trained)
    assert about["reward_accuracy"] == 1.0
    assert about["reward_margin"] > 0.5
    card = (trained / "model" / "README.md").read_text()
    assert "text-classification" in card
    assert "AutoPeftModelForSequenceClassification" in card


def test_reward_models_generate_no_text(trained):
    with pytest.raises(UsageError, match="reward_model"):
        compare(trained)
    with pytest.raises(UsageError, match="reward_model"):
        start_chat(trained)


def test_merged_reward_model_computes_the_same_rewards(trained, tmp_path):
    assert merge(trained, tmp_path / "merged").error < 1e-3
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    texts = [
        f"<|im_start|>user\nSay abcd<|im_end|>\n<|im_start|>assistant\n{one} abcd<|im_end|>\n" for one in ("yes", "no")
    ]
    yes, no = (model(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts)
    assert yes > no


def test_resumed_run_equals_the_uninterrupted_run(trained, tmp_path):
    folder = tmp_path / "run"
    copy_interrupted(trained, folder)
    with pytest.raises(InputRefused, match="task was reward, is dpo"):
        run(folder, resume=True, task="dpo")
    run(folder, resume=True)
    assert_equal_runs(trained, folder)
    assert any("score" in name for name in load_file(folder / "model" / "adapter_model.safetensors"))


def test_one_build_serves_dpo_and_reward_models(llama, data, tmp_path):
    write_build(data, llama, tmp_path / "built", task="dpo", test_size=4)
    options = {"model": llama, "output_dir": str(tmp_path / "run")}
    weights = {
        task: dry_run(str(tmp_path / "built"), settings={"max_steps": 2}, task=task, **options)[0].weights
        for task in ("auto", "dpo", "reward")
    }
    # The default task is that of the data. DPO needs a reference model.
    assert weights["auto"] == weights["dpo"] > 1.5 * weights["reward"]
    full = run(str(tmp_path / "built"), model=llama, output_dir=tmp_path / "run", task="reward", settings=SETTINGS)
    assert read_run(full)["reward_accuracy"] == 1.0
