"""The end of a run: the model saved, read back and compared; what came of it, as card, figures and picture."""

from __future__ import annotations

import math
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
from ftdata.train.model.load import load_model_config, wants_adapter, weights_dtype
from ftdata.train.runs.model_card import render_model_card
from ftdata.train.runs.plots import draw_sparkline, write_loss_plot
from ftdata.train.runs.trainer import BuildTrainer

_SEEN = 64
"""Tokens by which a saved model is compared with the one in memory."""


def set_stop_tokens(trainer: BuildTrainer, config: Config, data: TrainingData) -> list[int]:
    """Let the model stop where its data teaches it to; the trainer aligns that with the tokenizer's EOS alone."""
    stops = data.stops(str(config.tokenizer))
    trainer.model.generation_config.eos_token_id = stops or trainer.processing_class.eos_token_id
    trainer.model.generation_config.pad_token_id = trainer.processing_class.pad_token_id
    return stops


def finish_run(
    trainer: BuildTrainer, config: Config, data: TrainingData, run: Path, console: Console, found: Estimate
) -> Path:
    """Save, judge and read back what was trained; the folder of the run then says that it is finished.

    Raises:
        InternalError: what is read back says something else than the model in memory.
    """
    taught = set_stop_tokens(trainer, config, data)
    # The trainer has asked routers for their logits, which whoever generates has no use for.
    router = getattr(
        load_model_config(config.model, trust_remote_code=config.trust_remote_code), "output_router_logits", None
    )
    if router is not None:
        trainer.model.config.output_router_logits = router
    trainer.save_model(str(run / "model"))
    loss = trainer.token_loss(trainer.eval_dataset)[0] if trainer.eval_dataset is not None else None
    if not device.is_main_process():
        device.wait_for_processes()
        return run
    history, tokenizer = trainer.state.log_history, load_tokenizer(config.tokenizer)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    trainer.model.generation_config.save_pretrained(str(run / "model"))
    # A pickle of settings: nothing reads it, and strangers should not have to.
    (run / "model" / "training_args.bin").unlink(missing_ok=True)
    write_loss_plot(history, run)
    about = {
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
        "test_loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700)),
        "stops": [tokenizer.piece(id_) for id_ in taught],
        "estimate": found.as_dict(),
    }
    (run / "model" / "README.md").write_text(render_model_card(config, about, data.manifest), encoding="utf-8")
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if not sharded:
        # Spread over processes, one alone does not have it whole.
        _read_back(trainer, FinishedRun(run, about, config.trust_remote_code), data, config)
    checkpoints.write_json_atomically(run / "run.json", about)
    _say_result(console, run, about, "saved" if sharded else "saved, and read back")
    device.wait_for_processes()
    return run


def _read_back(trainer: BuildTrainer, run: FinishedRun, data: TrainingData, config: Config) -> None:
    """Load what was saved, and hold it against the model in memory."""
    ids = data.splits["train"][0]["input_ids"][:_SEEN]
    before = compute_logits(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), ids)
    # Two models do not have to fit.
    trainer.release()
    check_reloads(run, ids, before, weights_dtype(config))


def _say_result(console: Console, run: Path, about: Mapping[str, Any], done: str) -> None:
    losses = about["loss"]
    if losses:
        console.print(f"loss {losses[0]:.3f} {draw_sparkline(losses)} {losses[-1]:.3f}", highlight=False)
    if about["perplexity"] is not None:
        console.print(f"perplexity {about['perplexity']:.3f} per trained token of the test split", highlight=False)
    if about["best_step"] is not None and about["best_step"] != about["steps"]:
        console.print(f"the model of step {about['best_step']}, the best of {about['steps']}", highlight=False)
    said = f"{done}: {run / 'model'}; loss as a picture in {run / 'loss.png'}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
