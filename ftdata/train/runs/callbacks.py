"""While a run goes on: how far it is, its loss as a picture, what the model answers by now; and when to give up."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

from ftdata.errors import InputRefused, escape_unprintable
from ftdata.storage.atomic import replace_file
from ftdata.tokenizing.tokenizer import Tokenizer
from ftdata.train.inference.generation import generate_ids
from ftdata.train.runs.plots import draw_chart

SAMPLE_TOKENS = 64


class TrainingProgressCallback(TrainerCallback):
    """Shows step, loss, speed and time left: as a picture to who is watching, as lines to a file.

    Raises:
        InputRefused: the loss is no number any more; from `on_log`, so out of `Trainer.train`.
    """

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[says]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._console = console
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("train", says="")
        self._live: Live | None = None
        self._losses: list[float] = []
        self._says: dict[str, str] = {}
        self._began = self._since = time.perf_counter()
        self._before = 0
        self._at = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        self._bar.update(self._task, total=state.max_steps, completed=state.global_step)
        self._began = self._since = time.perf_counter()
        self._at = state.global_step
        if self._console.is_terminal:
            self._live = Live(self._picture(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise InputRefused(
                "diverged",
                f"the loss is {loss} at step {state.global_step}: nothing is learnt any more",
                hint="lower train.learning_rate, or set train.max_grad_norm; whole checkpoints are kept",
            )
        if loss is not None:
            self._losses.append(loss)
            self._says["loss"] = f"loss {loss:.4f}"
            self._speed(logs)
        if "eval_loss" in logs:
            says = f"eval_loss {logs['eval_loss']:.4f}  perplexity {math.exp(min(logs['eval_loss'], 700)):.3f}"
            self._says["eval"] = says
            # Evaluating is not training: it does not count for the speed.
            self._since = time.perf_counter()
        self._bar.update(self._task, says="  ".join(self._says.values()))
        if self._live is not None:
            self._live.update(self._picture())
        elif loss is not None or "eval_loss" in logs:
            left = (time.perf_counter() - self._began) / max(state.global_step - self._at, 1)
            said = [self._says["eval"]] if "eval_loss" in logs else [self._says["loss"], self._says.get("speed", "")]
            time_left = f"{left * (state.max_steps - state.global_step):.0f} s left"
            self._say(f"step {state.global_step}/{state.max_steps}  {'  '.join(filter(None, said))}  {time_left}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; also where training did not end by itself."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _speed(self, logs: dict[str, Any]) -> None:
        now, tokens = time.perf_counter(), int(logs.get("num_tokens", 0))
        if now > self._since and tokens > self._before:
            self._says["speed"] = f"{(tokens - self._before) / (now - self._since):,.0f} tokens/s"
        self._since, self._before = now, tokens

    def _picture(self) -> Group:
        drawn = [Text(draw_chart(self._losses, max(self._console.width - 12, 8)), style="cyan")] if self._losses else []
        return Group(*drawn, self._bar)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        # A kill in the middle of writing left a part of it.
        return math.inf


class SampleCallback(TrainerCallback):
    """Asks the model the same prompts at every evaluation: into `samples.jsonl`, and to who is watching.

    Args:
        prompts: token ids.
        expected: the answers of the data, where there are any.
        tokenizer: spells both.
        path: the file, to which lines are added.
        console: what is printed on.
    """

    def __init__(
        self,
        prompts: Sequence[list[int]],
        expected: Sequence[list[int] | None],
        tokenizer: Tokenizer,
        path: Path,
        console: Console,
    ) -> None:
        self._prompts, self._expected, self._tokenizer = prompts, expected, tokenizer
        self._path, self._console = path, console

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # What was said after the checkpoint that is gone on from is said again.
        kept = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        with replace_file(self._path) as file:
            file.write_text("".join(f"{line}\n" for line in kept if _step(line) <= state.global_step), encoding="utf-8")

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        answers = generate_ids(model, self._prompts, max_new_tokens=SAMPLE_TOKENS)
        with self._path.open("a", encoding="utf-8") as file:
            for prompt, expected, answer in zip(self._prompts, self._expected, answers, strict=True):
                said = {
                    "step": state.global_step,
                    "prompt": self._tokenizer.decode(prompt),
                    "expected": None if expected is None else self._tokenizer.decode(expected),
                    "answer": self._tokenizer.decode(answer),
                }
                file.write(json.dumps(said, ensure_ascii=False) + "\n")
                asked = self._tokenizer.decode(prompt, skip_control=True).strip()
                self._show(asked, said["answer"])

    def _show(self, asked: str, answer: str) -> None:
        asked, answer = (escape_unprintable(" ".join(text.split())) for text in (asked, answer))
        line = Text.assemble("  ", (asked[-50:], "dim"), " → ", (answer, "green"))
        line.truncate(max(self._console.width, 60), overflow="ellipsis")
        self._console.print(line)
