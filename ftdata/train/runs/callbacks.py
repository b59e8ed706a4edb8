"""Trainer callbacks that show progress, stop training at an invalid loss, and generate sample answers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

from ftdata.config import Config
from ftdata.errors import InputRefused, escape_unprintable
from ftdata.storage.atomic import replace_file
from ftdata.tokenizing.load import load_tokenizer
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.train.dataset import TrainingData, desirable_rows
from ftdata.train.inference.generation import BatchInputs, batch_images, generate_ids
from ftdata.train.inference.prompts import (
    describe_prompt,
    encode_messages,
    find_last_turn,
    read_documents,
    rebuild_recipe,
)
from ftdata.train.model.vision import ImagePreprocessor
from ftdata.train.runs.plots import draw_chart

SAMPLE_TOKENS = 64


class TrainingProgressCallback(TrainerCallback):
    """Shows the step, loss, speed and remaining time as a live chart on a terminal, or as text lines otherwise.

    Raises:
        InputRefused: the loss is NaN or infinite; raised by `on_log`, and so by `Trainer.train`.
    """

    def __init__(self, console: Console) -> None:
        counts = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self._console = console
        self._bar = Progress(*counts, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
        self._task = self._bar.add_task("train", status="")
        self._live: Live | None = None
        self._losses: list[float] = []
        self._status: dict[str, str] = {}
        self._start_time = self._last_log_time = time.perf_counter()
        self._last_tokens = 0
        self._start_step = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._start_time = self._last_log_time = time.perf_counter()
        self._start_step = state.global_step
        if self._console.is_terminal:
            self._live = Live(self._render_live(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            message = f"the loss is {loss} at step {state.global_step}: training diverged"
            hint = "lower train.learning_rate, or set train.max_grad_norm; complete checkpoints are kept"
            raise InputRefused("diverged", message, hint=hint)
        if loss is not None:
            self._losses.append(loss)
            self._status["loss"] = f"loss {loss:.4f}"
            self._update_speed(logs)
        if "eval_loss" in logs:
            self._status["eval"] = f"eval_loss {logs['eval_loss']:.4f}{_describe_measure(logs)}"
            # The time for an evaluation does not count toward the training speed.
            self._last_log_time = time.perf_counter()
        self._bar.update(self._task, status="  ".join(self._status.values()))
        if self._live is not None:
            self._live.update(self._render_live())
        elif loss is not None or "eval_loss" in logs:
            step_seconds = (time.perf_counter() - self._start_time) / max(state.global_step - self._start_step, 1)
            shown = ["eval"] if "eval_loss" in logs else ["loss", "speed"]
            status = "  ".join(self._status[name] for name in shown if name in self._status)
            time_left = f"{step_seconds * (state.max_steps - state.global_step):.0f} s left"
            line = f"step {state.global_step}/{state.max_steps}  {status}  {time_left}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the live chart and release the terminal. The method is also called if training is interrupted."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _update_speed(self, logs: dict[str, Any]) -> None:
        now, tokens = time.perf_counter(), int(logs.get("num_tokens", 0))
        if now > self._last_log_time and tokens > self._last_tokens:
            speed = (tokens - self._last_tokens) / (now - self._last_log_time)
            self._status["speed"] = f"{speed:,.0f} tokens/s"
        self._last_log_time, self._last_tokens = now, tokens

    def _render_live(self) -> Group:
        width = max(self._console.width - 12, 8)
        charts = [Text(draw_chart(self._losses, width), style="cyan")] if self._losses else []
        return Group(*charts, self._bar)


def _read_step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        # The process was killed while it wrote this line.
        return math.inf


@dataclass(eq=False)
class SampleCallback(TrainerCallback):
    """Generates answers to the same prompts at every evaluation.

    All answers are written to `samples.jsonl`. The console shows an answer only if it changed.

    Attributes:
        prompts: token ids of the prompts.
        questions: text of the prompts without control tokens.
        expected: token ids of the expected answers, or `None` for prompts without an expected answer.
        tokenizer: the tokenizer that decodes prompts and answers.
        path: the file that lines are appended to.
        console: the console that prompts and answers are printed to.
        image_inputs: returns the inputs for the images of a batch; `None` if the prompts have no images.
    """

    prompts: Sequence[list[int]]
    questions: Sequence[str]
    expected: Sequence[list[int] | None]
    tokenizer: Tokenizer
    path: Path
    console: Console
    image_inputs: BatchInputs | None = None
    _printed: dict[int, str] = field(default_factory=dict)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A resumed run repeats the evaluations after its checkpoint, so their samples are removed.
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        earlier = "".join(f"{line}\n" for line in lines if _read_step(line) <= state.global_step)
        with replace_file(self.path) as file:
            file.write_text(earlier, encoding="utf-8")

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        answers = generate_ids(model, self.prompts, image_inputs=self.image_inputs, max_new_tokens=SAMPLE_TOKENS)
        with self.path.open("a", encoding="utf-8") as file:
            samples = zip(self.prompts, self.expected, answers, strict=True)
            for number, (prompt, expected, answer) in enumerate(samples):
                sample = {
                    "step": state.global_step,
                    "prompt": self.questions[number] if self.image_inputs else self.tokenizer.decode(prompt),
                    "expected": None if expected is None else self.tokenizer.decode(expected),
                    "answer": self.tokenizer.decode(answer),
                }
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
                if self._printed.get(number) != sample["answer"]:
                    self._printed[number] = str(sample["answer"])
                    self._print_sample(self.questions[number], self._printed[number])

    def _print_sample(self, prompt: str, answer: str) -> None:
        prompt, answer = (escape_unprintable(" ".join(text.split())) for text in (prompt, answer))
        line = Text.assemble("  ", (prompt[-50:], "dim"), " → ", (answer, "green"))
        line.truncate(max(self.console.width, 60), overflow="ellipsis")
        self.console.print(line)


def make_sample_callback(
    config: Config,
    data: TrainingData,
    run: Path,
    stop_ids: set[int],
    console: Console,
    preprocessor: ImagePreprocessor | None,
) -> SampleCallback:
    """Create the callback that generates answers to the configured prompts, or to prompts of the test split."""
    tokenizer, recipe = (
        load_tokenizer(config.tokenizer),
        rebuild_recipe(str(config.tokenizer), data.manifest["options"]),
    )
    expected: list[list[int] | None]
    image_inputs = None
    if isinstance(config.samples, int):
        held_out = read_documents(desirable_rows(data.splits["test"])) if "test" in data.splits else iter(())
        turns = (turn for document in held_out if (turn := find_last_turn(document, stop_ids, recipe)) is not None)
        samples = list(islice(turns, config.samples))
        prompts, expected = [turn.prompt for turn in samples], [turn.answer for turn in samples]
        image_inputs = batch_images(preprocessor, [turn.images for turn in samples])
        questions = [describe_prompt(turn, tokenizer) for turn in samples]
    else:
        prompts = [encode_messages([{"role": "user", "content": text}], recipe) for text in config.samples]
        expected = [None] * len(prompts)
        questions = [tokenizer.decode(prompt, skip_control=True).strip() for prompt in prompts]
    return SampleCallback(prompts, questions, expected, tokenizer, run / "samples.jsonl", console, image_inputs)


def _describe_measure(logs: Mapping[str, float]) -> str:
    """Return the measure of an evaluation other than the loss, with two spaces before it."""
    for name, text in (
        ("eval_perplexity", "perplexity {:.3f}"),
        ("eval_rewards/accuracies", "reward accuracy {:.1%}"),
        ("eval_accuracy", "reward accuracy {:.1%}"),
        ("eval_rewards/margins", "reward margin {:.3f}"),
    ):
        if name in logs:
            return f"  {text.format(logs[name])}"
    return ""
