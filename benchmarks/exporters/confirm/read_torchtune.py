"""Read an export with the data loader of torchtune's recipe, and compute losses with the recipe's loss step."""

import contextlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
import torchao
import torchtune
import transformers
from omegaconf import OmegaConf

LOSS_BATCHES = 2


class HuggingFaceModel(torch.nn.Module):
    """MODEL with the arguments of a model of torchtune, which has no Qwen3 model."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    def forward(self, tokens: Any, input_pos: Any = None, mask: Any = None) -> Any:
        """Return the logits."""
        mask = None if mask is None else mask[:, None]
        return self.model(tokens, position_ids=input_pos, attention_mask=mask, use_cache=False).logits


class TargetRecorder:
    """A loss function that keeps the shifted labels of the recipe."""

    ignore_index = common.IGNORE_INDEX

    def __call__(self, logits: Any, labels: Any) -> Any:
        """Keep the labels."""
        self.targets = labels
        return logits.sum()


def make_recipe(pad_id: int) -> Any:
    """Return the recipe for full fine-tuning with the attributes that its loader and its loss step use."""
    file = Path(torchtune.__file__).parents[1] / "recipes" / "full_finetune_single_device.py"
    recipe_class = runpy.run_path(str(file))["FullFinetuneRecipeSingleDevice"]
    # The constructor requires checkpoints in the format of a model of torchtune.
    recipe = recipe_class.__new__(recipe_class)
    recipe._tokenizer = SimpleNamespace(pad_id=pad_id)
    recipe.activations_handling_ctx = contextlib.nullcontext()
    return recipe


def read_targets(recipe: Any, batch: dict[str, Any]) -> list[list[int]]:
    """Return the targets of the loss for each token, as the loss step of the recipe computes them."""
    shape = batch["tokens"].shape
    recipe._model, recipe._loss_fn = lambda tokens, **_: torch.zeros(*tokens.shape, 1), TargetRecorder()
    recipe._loss_step(dict(batch))
    return recipe._loss_fn.targets.reshape(shape).tolist()


def split_row(ids: list[int], targets: list[int], positions: list[int], mask: Any) -> Iterator[Any]:
    """Split a packed row where the attention mask of the collator separates documents."""
    starts = [0, *(index for index in range(1, len(ids)) if not mask[index, index - 1])]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        assert torch.equal(mask[start:end, start:end], torch.ones(end - start, end - start, dtype=torch.bool).tril())
        assert not mask[start:end, :start].any()
        assert positions[start:end] == list(range(end - start))
        # The last document of a row can be padding: untrained tokens 0.
        if end == len(ids) and not any(ids[start:]) and set(targets[start:]) == {common.IGNORE_INDEX}:
            continue
        assert targets[end - 1] == common.IGNORE_INDEX, "the first token of the next document is a target"
        yield ids[start:end], targets[start : end - 1]


def main() -> None:
    """Read all batches of the recipe's data loader."""
    export, model_path, output = common.arguments()
    sys.path.insert(0, str(export))
    # The documentation of the module contains the lines for the configuration of the user.
    import ftdata_tokens

    config = OmegaConf.create(ftdata_tokens.__doc__.partition("\n\n")[2])
    pad_id = transformers.AutoTokenizer.from_pretrained(model_path).pad_token_id
    recipe = make_recipe(pad_id)
    recipe._loss_fn = torch.nn.CrossEntropyLoss()
    # The loader drops an incomplete batch, so the batch size is a divisor of the number of rows.
    rows = len(ftdata_tokens.PackedTokens("train"))
    batch_size = next(size for size in (2, 3, 5, 7, 1) if rows % size == 0)
    loader = recipe._setup_data(config.dataset, shuffle=True, batch_size=batch_size, collate_fn=config.collate_fn)
    recipe.ignore_labels_cache = torch.full((batch_size, 1), recipe._loss_fn.ignore_index)
    model, documents, losses = HuggingFaceModel(model_path), [], []
    for batch in loader:
        first = len(documents)
        for row, targets in enumerate(read_targets(recipe, batch)):
            ids = batch["tokens"][row].tolist()
            if config.dataset.packed:
                documents += split_row(ids, targets, batch["input_pos"][row].tolist(), batch["mask"][row])
            else:
                length = next(index for index in range(len(ids), 0, -1) if ids[index - 1] != pad_id)
                assert set(targets[length - 1 :]) == {common.IGNORE_INDEX}
                documents.append((ids[:length], targets[: length - 1]))
        if len(losses) < LOSS_BATCHES:
            recipe._model, recipe._loss_fn = model, torch.nn.CrossEntropyLoss()
            with torch.no_grad():
                losses.append(([ids for ids, _ in documents[first:]], float(recipe._loss_step(dict(batch)))))
    common.save(output, documents, f"torchtune {torchtune.__version__}, torchao {torchao.__version__}", losses)


main()
