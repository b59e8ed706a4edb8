"""Data and comparisons of the trainings on rated answers."""

import json
import random
import shutil
import time

from ftdata.storage.atomic import lock_file

CHATML_TRAINED_TO_THE_END = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""No text follows the stop token, so the mask of TRL, which is all tokens after the prompt, is right."""

TRL_SETTINGS = {
    "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none",
    "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False, "max_length": None,
    "activation_checkpointing": False, "remove_unused_columns": False, "train_sampling_strategy": "sequential",
}  # fmt: skip
"""Settings of the comparisons with the losses of TRL's trainers: three steps on batches in a fixed order."""


def make_words(count):
    """Return random words, the same ones in each call."""
    generator = random.Random(0)
    return ["".join(generator.choices("abcdefgh", k=4)) for _ in range(count)]


def make_pairs(count):
    """Return pairs in which the chosen answer repeats the question, and the rejected answer does not."""
    return [{"prompt": f"Say {word}", "chosen": f"yes {word}", "rejected": f"no {word}"} for word in make_words(count)]


def write_rows(path, rows):
    """Write rows as JSON Lines. Return the path as a text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_messages(row):
    """Return a row whose texts are lists of one message, as the trainers of TRL need them."""
    return {
        name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
        if isinstance(text, str)
        else text
        for name, text in row.items()
    }


def copy_interrupted(trained, folder):
    """Copy a run of 20 steps, as if it had been interrupted before the last checkpoint. Return its `run.json`."""
    shutil.copytree(trained, folder)
    about = read_run(folder)
    kept = {name: about[name] for name in ("ftdata", "fingerprint", "setup")}
    (folder / "run.json").write_text(json.dumps({**kept, "finished": False}))
    shutil.rmtree(folder / "checkpoint-20")
    shutil.rmtree(folder / "model")
    return about


def wait_until_unlocked(run):
    """Wait until a killed training has ended. It is not a child of the killed client (see `warm.py`)."""
    for _ in range(1_000):
        with lock_file(run / ".lock") as is_locked:
            if is_locked:
                return
        time.sleep(0.01)
    raise TimeoutError(run)


def read_run(folder):
    """Return the content of `run.json`."""
    return json.loads((folder / "run.json").read_text())


def assert_equal_runs(left, right):
    """Assert that two runs have equal losses and equal adapters, bit by bit."""
    import torch
    from safetensors.torch import load_file

    assert read_run(left)["loss"] == read_run(right)["loss"]
    weights = [load_file(folder / "model" / "adapter_model.safetensors") for folder in (left, right)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
