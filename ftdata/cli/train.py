"""Commands that train, evaluate and use models. Each command calls a function of `ftdata.train`."""

from __future__ import annotations

import inspect
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftdata.cli.options import Json, add_options, add_parameters
from ftdata.cli.output import print_report, print_value, write_stdout
from ftdata.errors import UsageError, escape_unprintable
from ftdata.spelling import set_style

if TYPE_CHECKING:
    from ftdata.train.inference.progress import GenerationProgress

Run = Annotated[Path, typer.Argument(help="Directory of a finished training run", show_default=False)]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Base model: Hub ID or folder")]
BatchSize = Annotated[int, typer.Option(help="Number of prompts per batch", min=1)]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code from the model repository")]
UseBase = Annotated[bool, typer.Option("--base", help="Use the base model instead of the trained model")]


@add_options("task", "template", "limit")
def init(
    data: Annotated[
        str, typer.Argument(help="Training data, in any format that `ftdata build` reads", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="Base model: Hub ID or folder")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Output file, or - for standard output")] = Path(
        "run.yaml"
    ),
    output_dir: Annotated[
        str | None, typer.Option(help="Run directory of the training (default: run, or run-2 if run is not empty)")
    ] = None,
    *,
    trust_remote_code: TrustRemoteCode = False,
    **options: Any,
) -> None:
    """Write a commented training configuration. Its values are computed from the data and the model."""
    from ftdata.train import init as make_config_text

    if str(output) != "-" and (output.exists() or output.is_symlink()):
        raise UsageError("target_exists", f"{output} already exists", hint="choose another file with --output")
    output_dir = output_dir or _new_run_dir()
    text = make_config_text(data, model, output_dir, trust_remote_code=trust_remote_code or None, **options)
    if str(output) == "-":
        write_stdout(text)
        return
    output.write_text(text, encoding="utf-8")
    print(f"wrote {output}; review it, then run: ftdata train {output}")


def _new_run_dir() -> str:
    """Return the first of run, run-2, run-3, ... that is not a file or a folder with files."""
    names = itertools.chain(["run"], (f"run-{number}" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists() or _is_empty_folder(Path(name)))


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


@add_options(
    *("task", "template", "schema", "columns", "train_on", "turns", "max_length", "overlong", "packing"),
    *("test_size", "limit", "on_bad_rows", "max_rejects", "image_folder", "download_images"),
)
def train(
    source: Annotated[
        str,
        typer.Argument(help="Configuration file (.yaml, .toml), data, a build, or a run to resume", show_default=False),
    ],
    model: Model = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="Output directory of the run")] = None,
    *,
    quantization: Annotated[str | None, typer.Option(help="Quantize the base model: nf4 (QLoRA), fp4 or int8")] = None,
    lora_r: Annotated[int | None, typer.Option(help="Rank of the LoRA adapter")] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="Attention implementation, e.g. sdpa, eager or flash_attention_2")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Set a configuration field, e.g. learning_rate=1e-4 (repeatable)")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate memory, steps and time, and exit without training")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Resume from the last complete checkpoint")] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Train a model on data or a build, with LoRA, QLoRA or full fine-tuning."""
    import ftdata.train
    from ftdata.config import is_config_file

    if is_config_file(source):
        set_style("keys")
    options |= {
        "model": model,
        "output_dir": output_dir,
        "settings": set_ or [],
        "quantization": quantization,
        "lora_r": lora_r,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code or None,
    }
    if dry_run:
        estimate, notes = ftdata.train.dry_run(source, **options)
        print_value(estimate, as_json=as_json)
        for note in notes:
            print(note, file=sys.stderr)
        return
    folder = ftdata.train.run(source, resume=resume, **options)
    if as_json:
        write_stdout((folder / "run.json").read_text(encoding="utf-8"))


def _generation_options(
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of generated tokens per answer", min=1)] = 256,
    num_beams: Annotated[
        int, typer.Option(help="Number of beams in beam search (default: 1, no beam search)", min=1)
    ] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature, e.g. 0.7 (default: greedy decoding)")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Top-p (nucleus) sampling threshold")] = None,
    seed: Annotated[int, typer.Option(help="Random seed for sampling")] = 0,
    trust_remote_code: TrustRemoteCode = False,
) -> dict[str, Any]:
    """Convert the options of commands that generate answers to arguments of `model.generate`."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "trust_remote_code": trust_remote_code}
    if num_beams > 1:
        options |= {"num_beams": num_beams, "early_stopping": True}
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError("top_p", f"--top-p is {top_p}, expected a number above 0 and up to 1")
    # A temperature of 0 means greedy decoding, as in other tools.
    if temperature != 0 and (temperature is not None or top_p is not None):
        temperature = 1.0 if temperature is None else temperature
        options |= {
            "do_sample": True,
            "temperature": temperature,
            "top_p": 1.0 if top_p is None else top_p,
            "seed": seed,
        }
    return options


_add_generation_options = add_parameters(
    inspect.signature(_generation_options, eval_str=True).parameters.values(), _generation_options
)


@_add_generation_options
def evaluate(
    run_dir: Run,
    data: Annotated[
        str | None, typer.Option(help="Evaluation data with expected answers (default: the run's test split)")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Number of rows to evaluate, or 0 for all rows", min=0)] = 20,
    *,
    batch_size: BatchSize = 16,
    image_folder: Annotated[str | None, typer.Option(help="Folder of the images in --data")] = None,
    download_images: Annotated[bool, typer.Option("--download-images", help="Download images at URLs")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a side-by-side HTML report to this file")] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Compare a trained model with its base model: answers, perplexity, exact match, SacreBLEU, chrF."""
    from ftdata.train import compare

    with _generation_progress() as progress:
        images = {"image_folder": image_folder, "download_images": download_images}
        report = compare(run_dir, data, n or None, batch_size=batch_size, progress=progress, **images, **options)
    print_report(report, as_json=as_json)
    if html is not None:
        report.write_html(html)


@_add_generation_options
def generate(
    run_dir: Run,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts to answer (default: the lines of standard input)")
    ] = None,
    base: UseBase = False,
    *,
    batch_size: BatchSize = 16,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Generate answers to prompts with a trained model."""
    from ftdata.train import generate as generate_answers

    questions = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not questions:
        problem = "no prompt was passed"
        raise UsageError("missing_option", problem, hint="pass prompts as arguments or as lines on standard input")
    with _generation_progress() as progress:
        answers = generate_answers(run_dir, questions, base=base, batch_size=batch_size, progress=progress, **options)
    if as_json:
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(questions, answers, strict=True)]
        write_stdout(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        write_stdout("\n".join(escape_unprintable(answer) for answer in answers))


@_add_generation_options
def chat(
    run_dir: Run,
    base: UseBase = False,
    system: Annotated[str | None, typer.Option(help="System message of the chat")] = None,
    **options: Any,
) -> None:
    """Chat with a trained model. /new starts a new conversation. An empty line or Ctrl-D exits."""
    from ftdata.train import start_chat

    session = start_chat(run_dir, base=base, system=system, **options)
    first_messages, has_warned = list(session.messages), False
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not text.strip():
            break
        if text.strip() == "/new":
            session.messages = list(first_messages)
            continue
        write_stdout(escape_unprintable(session.say(text)))
        if session.is_single_turn and len(session.messages) > 2 and not has_warned:
            has_warned = True
            print(
                "(the template renders only the last question, so the model does not see earlier messages)",
                file=sys.stderr,
            )


def merge(
    run_dir: Run,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="Output folder for the merged model")],
    dtype: Annotated[
        str | None, typer.Option(help="Weight dtype: float32, bfloat16 or float16 (default: dtype of the base model)")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Merge the adapter of a run into its base model, and save the merged model."""
    from ftdata.train import merge as merge_run

    merged = merge_run(run_dir, output_dir, dtype=dtype, trust_remote_code=trust_remote_code)
    print(f"merged into {output_dir} in {merged.dtype}")
    print(f"largest relative difference from the adapter's logits: {merged.error:.1g} (limit {merged.limit:g})")


_ANNOUNCE_SECONDS = 10.0
"""Shortest remaining time that is announced. Without a terminal, progress lines follow at three times this interval."""


@contextmanager
def _generation_progress() -> Iterator[Callable[[GenerationProgress], None]]:
    """Show the progress and the maximum remaining time of generation. Without a terminal, print progress lines."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as ProgressBars

    console = Console(stderr=True)
    columns = (TextColumn("answers {task.fields[answers]}"), BarColumn(), TextColumn("{task.fields[remaining]}"))
    with ProgressBars(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        task = bars.add_task("answers", total=None, answers="", remaining="")
        last_announcement: float | None = None

        def show(progress: GenerationProgress) -> None:
            nonlocal last_announcement
            left, answers = progress.seconds_left, f"{progress.answers}/{progress.of_answers}"
            remaining = "" if left is None else f"at most {_format_duration(left)} left"
            bars.update(task, completed=progress.steps, total=progress.of_steps, answers=answers, remaining=remaining)
            # The second token is slower than later tokens, so the speed is reported after four steps.
            has_speed = left is not None and progress.steps >= min(4, progress.of_steps)
            text, now = "", time.perf_counter()
            if last_announcement is None and left is not None and has_speed and left >= _ANNOUNCE_SECONDS:
                speed = f"{progress.seconds_per_step:.2g} s per token; reduce --max-new-tokens or -n to shorten it"
                text = f"{progress.of_answers} answers take at most {_format_duration(left)} ({speed})"
            elif last_announcement is not None and left is not None and not console.is_terminal:
                is_due = now - last_announcement > 3 * _ANNOUNCE_SECONDS
                text = f"{answers} answers, {remaining}" if is_due else ""
            if text:
                console.print(text, highlight=False, soft_wrap=True)
                last_announcement = now

        yield show


def _format_duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
