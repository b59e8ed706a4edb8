"""The estimated time of a run counts its evaluations."""

from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

from ftdata.train.model.estimate import count_evaluations


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"eval_strategy": "no"}, 1),
        ({"eval_strategy": "epoch"}, 1 + 3),
        ({"eval_strategy": "steps", "eval_steps": 10}, 1 + 3),
        ({"eval_strategy": "steps", "eval_steps": 0.1}, 1 + 10),
        ({"eval_strategy": "steps", "eval_steps": None, "logging_steps": 15}, 1 + 2),
    ],
)
def test_evaluations_are_counted(settings, expected):
    """A run of 30 steps over 3 epochs; the finished model is evaluated once more."""
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": -1}
    arguments = SimpleNamespace(**batches, num_train_epochs=3, **settings)
    assert count_evaluations(30, 40, arguments) == expected
