"""Read an export with the configuration and data loader of NeMo Automodel, and compute losses with its recipe."""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import torch
import transformers
from nemo_automodel.components.config.loader import load_yaml_config
from nemo_automodel.components.distributed.context_parallel.utils import make_cp_batch_for_te
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.recipes._typed_config import RecipeConfig
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

LOSS_BATCHES = 2


def make_recipe(model_path: Path, tokenizer: Any) -> Any:
    """Return the recipe with the attributes that its training step uses."""
    # The setup of the recipe requires CUDA. NeMo Automodel also loads models with use_cache=False.
    recipe = TrainFinetuneRecipeForNextTokenPrediction.__new__(TrainFinetuneRecipeForNextTokenPrediction)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, use_cache=False)
    recipe.model_parts = [model]
    recipe.tokenizer = tokenizer
    recipe.loss_fn = MaskedCrossEntropy()
    recipe.dist_env = SimpleNamespace(device=torch.device("cpu"))
    recipe.device_mesh, recipe.te_fp8, recipe.pp_enabled = None, None, False
    return recipe


def compute_loss(recipe: Any, batch: dict[str, Any]) -> float:
    """Return the loss of the recipe's training step."""
    losses = list[torch.Tensor]()
    count = int((batch["labels"] != common.IGNORE_INDEX).sum())
    with torch.no_grad():
        recipe._forward_backward_step(
            0, dict(batch), loss_buffer=losses, num_label_tokens=count, num_batches=1, is_train=False
        )
    return float(losses[0])


def split_row(batch: dict[str, Any]) -> list[Any]:
    """Split a packed batch at the boundaries that NeMo Automodel passes to Transformer Engine."""
    flat = make_cp_batch_for_te(None, dict(batch))
    assert "cu_seqlens_padded" not in flat
    assert not flat["padding_mask"].any()
    ids, targets, positions = (flat[name].tolist() for name in ("input_ids", "labels", "position_ids"))
    documents = common.split_by_positions(ids, targets, positions)
    bounds = torch.tensor([0, *(len(ids) for ids, _ in documents)]).cumsum(0)
    assert flat["cu_seqlens"].tolist() == bounds.tolist()
    return documents


def split_padded(batch: dict[str, Any]) -> Iterator[Any]:
    """Return the documents of a padded batch."""
    for ids, targets, mask in zip(
        *(batch[name].tolist() for name in ("input_ids", "labels", "attention_mask")), strict=True
    ):
        length = sum(mask)
        assert set(targets[length - 1 :]) == {common.IGNORE_INDEX}
        yield ids[:length], targets[: length - 1]


def main() -> None:
    """Read all batches of the data loader of the recipe."""
    export, model_path, output = common.arguments()
    config = load_yaml_config(export / "automodel.yaml")
    is_packed = config.get("packed_sequence.packed_sequence_size", 0) > 0
    if not is_packed:
        config.set_by_dotted("step_scheduler.local_batch_size", 4)
    recipe_config = RecipeConfig(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_path)
    recipe = make_recipe(model_path, tokenizer)
    split = split_row if is_packed else split_padded
    build = {"tokenizer": tokenizer, "dp_rank": 0, "dp_world_size": 1}
    for validation in recipe_config.validation_dataloaders.values():
        assert validation.emits_thd == is_packed
        assert all(map(list, map(split, validation.build(**build))))
    documents, losses = [], []
    for batch in recipe_config.dataloader.build(**build):
        first = len(documents)
        documents += split(batch)
        if len(losses) < LOSS_BATCHES:
            losses.append(([ids for ids, _ in documents[first:]], compute_loss(recipe, batch)))
    common.save(output, documents, f"NeMo Automodel {version('nemo_automodel')}", losses)


main()
