"""Finish a run: save the model, evaluate the model, verify the saved files, and write the results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ftdata.config import Config
from ftdata.tokenizing.load import load_tokenizer
from ftdata.train import checkpoints
from ftdata.train.dataset import TrainingData
from ftdata.train.inference.run_dir import FinishedRun, check_reloads, compute_logits
from ftdata.train.model import device
from ftdata.train.model.estimate import Estimate
from ftdata.train.model.load import copy_sentencepiece_files, load_model_config, wants_adapter, weights_dtype
from ftdata.train.model.vision import copy_processor_files
from ftdata.train.runs.model_card import render_model_card
from ftdata.train.runs.plots import draw_sparkline, write_loss_plot
from ftdata.train.runs.trainer import RunTrainer

_COMPARED_TOKENS = 64
"""Number of tokens whose logits are compared between the saved model and the model in memory."""


def set_stop_tokens(trainer: RunTrainer, config: Config, data: TrainingData) -> list[int]:
    """Set the model's stop tokens to the control tokens that end the trained turns. Return the token ids.

    The trainer itself sets only the tokenizer's EOS token.
    """
    stop_ids = data.find_stop_tokens(str(config.tokenizer))
    trainer.model.generation_config.eos_token_id = stop_ids or trainer.processing_class.eos_token_id
    trainer.model.generation_config.pad_token_id = trainer.processing_class.pad_token_id
    return stop_ids


def finish_run(
    trainer: RunTrainer,
    config: Config,
    data: TrainingData,
    run: Path,
    console: Console,
    estimate: Estimate,
) -> Path:
    """Save, evaluate and reload the trained model, and mark the run as finished in `run.json`.

    Raises:
        InternalError: the logits of the reloaded model differ from those of the model in memory.
    """
    is_generator = config.task != "reward"
    stop_ids = set_stop_tokens(trainer, config, data) if is_generator else []
    # The trainer enables the output of router logits, which inference does not need.
    base_config = load_model_config(config.model, trust_remote_code=config.trust_remote_code)
    router = getattr(base_config, "output_router_logits", None)
    if router is not None:
        trainer.model.config.output_router_logits = router
    trainer.save_model(str(run / "model"))
    scores = trainer.test_scores()
    if not device.is_main_process():
        device.wait_for_processes()
        return run
    history, tokenizer = trainer.state.log_history, load_tokenizer(config.tokenizer)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    if is_generator:
        trainer.model.generation_config.save_pretrained(str(run / "model"))
    copy_sentencepiece_files(tokenizer, run / "model")
    if data.has_images and tokenizer.folder is not None:
        copy_processor_files(tokenizer.folder, run / "model")
    # This pickle of settings is not needed, and loading a pickle can run code.
    (run / "model" / "training_args.bin").unlink(missing_ok=True)
    write_loss_plot(history, run)
    metadata = {
        **checkpoints.describe_setup(config, data.manifest["fingerprint"], device.process_count()),
        "finished": True,
        "build": data.folder.name if data.folder.parent == run else str(data.folder.resolve()),
        "options": data.manifest["options"],
        "adapter": wants_adapter(config),
        "embeddings": trainer.model.get_input_embeddings().weight.shape[0],
        "trust_remote_code": config.trust_remote_code,
        "data": config.data,
        "tokenizer": config.tokenizer,
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step if trainer.args.load_best_model_at_end else None,
        "stopped_early": config.early_stopping if trainer.state.global_step < trainer.state.max_steps else None,
        "loss": losses,
        **scores,
        "stops": [tokenizer.id_to_token(id_) for id_ in stop_ids],
        "estimate": estimate.as_dict(),
    }
    (run / "model" / "README.md").write_text(render_model_card(config, metadata, data.manifest), encoding="utf-8")
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not is_sharded:
        # A single process does not hold all weights of a sharded model, so it cannot compare them.
        _read_back(trainer, FinishedRun(run, metadata, config.trust_remote_code), data, config)
    checkpoints.write_json_atomically(run / "run.json", metadata)
    _print_results(console, run, metadata, "saved" if is_sharded else "saved, and checked by reloading")
    device.wait_for_processes()
    return run


def _read_back(trainer: RunTrainer, run: FinishedRun, data: TrainingData, config: Config) -> None:
    """Reload the saved model, and compare its logits with the logits of the model in memory."""
    ids = data.first_document[:_COMPARED_TOKENS]
    before = compute_logits(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), ids)
    # Two models may not fit into memory together.
    trainer.release()
    check_reloads(run, ids, before, weights_dtype(config))


def _print_results(console: Console, run: Path, metadata: Mapping[str, Any], status: str) -> None:
    losses = metadata["loss"]
    if losses:
        console.print(f"loss {losses[0]:.3f} {draw_sparkline(losses)} {losses[-1]:.3f}", highlight=False)
    if metadata.get("perplexity") is not None:
        console.print(f"perplexity {metadata['perplexity']:.3f} per trained token of the test split", highlight=False)
    if metadata.get("reward_accuracy") is not None:
        share, margin = metadata["reward_accuracy"], metadata["reward_margin"]
        line = (
            f"test split: the chosen answer has the higher reward in {share:.1%} of the pairs; mean margin {margin:.3f}"
        )
        console.print(line, highlight=False, soft_wrap=True)
    if metadata["best_step"] is not None and metadata["best_step"] != metadata["steps"]:
        console.print(f"best model: step {metadata['best_step']} of {metadata['steps']}", highlight=False)
    message = f"{status}: {run / 'model'}; loss plot: {run / 'loss.png'}"
    console.print(message, highlight=False, markup=False, soft_wrap=True)
