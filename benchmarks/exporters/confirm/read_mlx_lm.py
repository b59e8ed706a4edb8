"""Read an export with its script for mlx-lm, and compute losses with the training loop of mlx-lm."""

import sys
from collections.abc import Iterator
from typing import Any

import common
import mlx_lm
import numpy as np
from mlx.optimizers import SGD
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, train

LOSS_BATCHES, BATCH_SIZE = 2, 2


class LossRecorder(TrainingCallback):
    """Keeps the losses that the training loop reports."""

    def __init__(self) -> None:
        self.losses = list[float]()

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Keep the loss of a batch."""
        self.losses.append(train_info["train_loss"])


def split_padded(batch: Any) -> Iterator[Any]:
    """Return the documents of a batch. The script shifts the labels by one position."""
    for ids, labels in zip(*(np.asarray(array).tolist() for array in batch), strict=True):
        # The token 0 pads a batch, and ends no document of the tokenizer.
        length = next(index for index in range(len(ids), 0, -1) if ids[index - 1])
        assert set(labels[length:]) <= {common.IGNORE_INDEX}
        yield ids[:length], common.shift(labels[:length])[:-1]


def main() -> None:
    """Train two batches with a learning rate of 0, and read the batches of an epoch."""
    export, model_path, output = common.arguments()
    sys.path.insert(0, str(export))
    import ftdata_tokens

    model, _ = mlx_lm.load(str(model_path))
    train_set, test_set = ftdata_tokens.load("train"), ftdata_tokens.load("test")
    longest = max(len(ids) for ids, _ in train_set)
    trained = []

    def iterate_batches(dataset: Any, **options: Any) -> Iterator[Any]:
        for batch in ftdata_tokens.iterate_batches(dataset, **options):
            trained.append([ids for ids, _ in split_padded(batch)])
            yield batch

    recorder = LossRecorder()
    train(
        model,
        SGD(0.0),
        train_set,
        args=TrainingArgs(
            batch_size=BATCH_SIZE,
            iters=LOSS_BATCHES,
            steps_per_report=1,
            max_seq_length=longest,
            adapter_file=str(output.with_suffix(".safetensors")),
        ),
        loss=ftdata_tokens.loss,
        iterate_batches=iterate_batches,
        training_callback=recorder,
    )
    losses = list(zip(trained[:LOSS_BATCHES], recorder.losses, strict=True))
    options = {"batch_size": BATCH_SIZE, "max_seq_length": longest, "iterate_batches": iterate_batches}
    loss = evaluate(model, test_set, num_batches=1, loss=ftdata_tokens.loss, **options)
    assert np.isfinite(loss)
    # The script drops an incomplete batch, so the batch size is a divisor of the number of documents.
    batch_size = next(size for size in (4, 3, 2, 5, 7, 1) if len(train_set) % size == 0)
    batches = ftdata_tokens.iterate_batches(train_set, batch_size, longest, loop=True)
    documents = [document for _ in range(len(train_set) // batch_size) for document in split_padded(next(batches))]
    common.save(output, documents, f"mlx-lm {mlx_lm.__version__}", losses)


main()
