"""Commands about models: begin, train, ask, judge, merge; a few lines over the functions of `ftdata.train`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ftdata.cli.options import Columns, Json, Limit, MaxLength, MaxRejects, Packing, Template, TestSize, parse_columns
from ftdata.cli.output import print_value, write_stdout
from ftdata.errors import UsageError, escape_unprintable

if TYPE_CHECKING:
    from ftdata.train.inference.progress import GenerationProgress

Run = Annotated[Path, typer.Argument(help="The folder of a finished run of `ftdata train`.", show_default=False)]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Folder or hub id of the base model.")]
Most = Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)]
Beams = Annotated[int, typer.Option("--num-beams", help="Beams to search with; 1 takes the likeliest token.", min=1)]
Temperature = Annotated[float | None, typer.Option(help="Sample by chance: 0.7 stays near what is likely.")]
TopP = Annotated[float | None, typer.Option(help="Sample among the tokens that hold this much of the chance.")]
ChanceSeed = Annotated[int, typer.Option("--seed", help="Decides what is sampled.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Base = Annotated[bool, typer.Option("--base", help="Ask the base model, as it was before.")]


def init(
    data: Annotated[str, typer.Argument(help="What will be trained on.", show_default=False)],
    model: Annotated[str, typer.Option("--model", "-m", help="Folder or hub id of the base model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write; - prints it.")] = Path("run.yaml"),
    output_dir: Annotated[str, typer.Option(help="Folder for the run, in the file.")] = "out",
    template: Template = None,
    limit: Limit = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write a commented configuration for data and a model, with values worked out from both."""
    from ftdata.train import init as worked_out

    if str(output) != "-" and output.exists():
        raise UsageError("target_exists", f"{output} is there already", hint="choose another name with --output")
    text = worked_out(
        data, model, output_dir, template=template, limit=limit, trust_remote_code=trust_remote_code or None
    )
    if str(output) == "-":
        write_stdout(text)
        return
    output.write_text(text, encoding="utf-8")
    print(f"wrote {output}; look at it, then: ftdata train {output}")


def train(
    source: Annotated[
        str,
        typer.Argument(
            help="A config file (.yaml, .toml), data, a build, or the folder of a run to go on with.",
            show_default=False,
        ),
    ],
    model: Model = None,
    output_dir: Annotated[str | None, typer.Option("--output-dir", "-o", help="Folder for the run.")] = None,
    template: Template = None,
    schema: Annotated[str | None, typer.Option(help="The shape of every row.")] = None,
    column: Columns = None,
    train_on: Annotated[str | None, typer.Option(help="assistant, last_assistant, completion, all.")] = None,
    turns: Annotated[str | None, typer.Option(help="auto, joint or split.")] = None,
    max_length: MaxLength = None,
    overlong: Annotated[str | None, typer.Option(help="reject, drop_turns or truncate.")] = None,
    packing: Packing = None,
    test_size: TestSize = None,
    limit: Limit = None,
    on_bad_rows: Annotated[str | None, typer.Option(help="error or quarantine.")] = None,
    max_rejects: MaxRejects = None,
    quantization: Annotated[str | None, typer.Option(help="Base model in few bits: nf4 (QLoRA), fp4 or int8.")] = None,
    lora_r: Annotated[int | None, typer.Option(help="Rank of the LoRA adapter.")] = None,
    attn_implementation: Annotated[str | None, typer.Option(help="sdpa, eager, flash_attention_2, ...")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any field: learning_rate=1e-4 (of SFTConfig), lora.alpha=32, mask.turns=split."),
    ] = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it takes: parameters, memory, steps, time; train nothing.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last whole checkpoint in the run's folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train a model on data or on a build, with LoRA, QLoRA or in full; save, read back, and draw the loss."""
    import ftdata.train

    given: dict[str, Any] = {
        "model": model,
        "output_dir": output_dir,
        "settings": set_ or [],
        "template": template,
        "schema": schema,
        "columns": parse_columns(column),
        "train_on": train_on,
        "turns": turns,
        "max_length": max_length,
        "overlong": overlong,
        "packing": packing,
        "test_size": test_size,
        "limit": limit,
        "on_bad_rows": on_bad_rows,
        "max_rejects": max_rejects,
        "quantization": quantization,
        "lora_r": lora_r,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code or None,
    }
    if dry_run:
        estimate, note = ftdata.train.dry_run(source, **given)
        print_value(estimate, as_json=as_json)
        if note and not as_json:
            print(note)
        return
    folder = ftdata.train.run(source, resume=resume, **given)
    if as_json:
        write_stdout((folder / "run.json").read_text(encoding="utf-8"))


def evaluate(
    run_dir: Run,
    data: Annotated[
        str | None, typer.Option(help="Questions with expected answers; default: the run's test split.")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="How many rows; 0: all.", min=0)] = 20,
    batch_size: Annotated[int, typer.Option(help="Prompts answered together.", min=1)] = 16,
    max_new_tokens: Most = 256,
    num_beams: Beams = 1,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: ChanceSeed = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with both, side by side.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Ask base and tuned model the same questions: side by side, perplexity, exact match, SacreBLEU, chrF."""
    from ftdata.train import compare

    options = _generation(max_new_tokens, num_beams, temperature, top_p, seed)
    options |= {"trust_remote_code": trust_remote_code}
    with _answering() as progress:
        report = compare(run_dir, data, n or None, batch_size=batch_size, progress=progress, **options)
    if as_json:
        print_value(report, as_json=True)
    else:
        from rich.console import Console

        report.print(Console())
    if html is not None:
        report.write_html(html)


def generate(
    run_dir: Run,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="What a user says, each by itself; default: lines of standard input.")
    ] = None,
    base: Base = False,
    batch_size: Annotated[int, typer.Option(help="Prompts answered together.", min=1)] = 16,
    max_new_tokens: Most = 256,
    num_beams: Beams = 1,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: ChanceSeed = 0,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Answer prompts with a tuned model."""
    from ftdata.train import generate as answered

    asked = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not asked:
        raise UsageError("missing_option", "nothing was asked", hint="name a prompt, or write lines to standard input")
    options = _generation(max_new_tokens, num_beams, temperature, top_p, seed)
    options |= {"trust_remote_code": trust_remote_code}
    with _answering() as progress:
        answers = answered(run_dir, asked, base=base, batch_size=batch_size, progress=progress, **options)
    if as_json:
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(asked, answers, strict=True)]
        write_stdout(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        write_stdout("\n".join(escape_unprintable(answer) for answer in answers))


def chat(
    run_dir: Run,
    base: Base = False,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Most = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: ChanceSeed = 0,
    trust_remote_code: Trust = False,
) -> None:
    """Talk with a tuned model; an empty line or Ctrl-D ends it, /new begins anew."""
    from ftdata.train import start_chat

    options = _generation(max_new_tokens, 1, temperature, top_p, seed)
    talk = start_chat(run_dir, base=base, system=system, trust_remote_code=trust_remote_code, **options)
    first, told = list(talk.messages), False
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not text.strip():
            break
        if text.strip() == "/new":
            talk.messages = list(first)
            continue
        write_stdout(escape_unprintable(talk.say(text)))
        if talk.forgets and len(talk.messages) > 2 and not told:
            told = True
            print("(the template shows one question: what was said before is not seen)", file=sys.stderr)


def merge(
    run_dir: Run,
    output_dir: Annotated[Path, typer.Option("--output-dir", "-o", help="A new folder for the whole model.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: that of the base model.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Write the base model with the run's adapter merged into it: a model that needs neither ftdata nor PEFT."""
    from ftdata.train import merge as merge_run

    merged = merge_run(run_dir, output_dir, dtype=dtype, trust_remote_code=trust_remote_code)
    print(f"merged into {output_dir} in {merged.dtype}")
    print(f"its logits differ from the adapter's by at most {merged.error:.1g} of the largest (limit {merged.limit:g})")


def _generation(
    max_new_tokens: int, num_beams: int, temperature: float | None, top_p: float | None, seed: int
) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if num_beams > 1:
        options |= {"num_beams": num_beams, "early_stopping": True}
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError("top_p", f"--top-p is {top_p}, expected a share above 0, to 1")
    # No heat at all: the likeliest, as everywhere.
    if temperature != 0 and (temperature is not None or top_p is not None):
        heat = 1.0 if temperature is None else temperature
        options |= {"do_sample": True, "temperature": heat, "top_p": 1.0 if top_p is None else top_p, "seed": seed}
    return options


_LONG = 10.0
"""Seconds of answering that are announced, and between two lines where no terminal shows a bar."""


@contextmanager
def _answering() -> Iterator[Callable[[GenerationProgress], None]]:
    """Show how long answering takes at most, and how far it is: as a bar on a terminal, as lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    columns = (TextColumn("answers {task.fields[answers]}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Bars(*columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("answers", total=None, answers="", left="")
        announced: list[float] = []

        def show(now: GenerationProgress) -> None:
            left = "" if now.seconds_left is None else f"at most {_duration(now.seconds_left)} left"
            answers = f"{now.answers}/{now.of_answers}"
            bars.update(task, completed=now.steps, total=now.of_steps, answers=answers, left=left)
            if now.seconds_left is None or (not announced and now.seconds_left < _LONG):
                return
            # The second token is slower than those after it.
            if not announced and now.steps >= min(4, now.of_steps):
                speed = f"{now.seconds_per_step:.2g} s a token; fewer with --max-new-tokens or -n"
                text = f"{now.of_answers} answers take at most {_duration(now.seconds_left)} ({speed})"
                console.print(text, highlight=False, soft_wrap=True)
                announced.append(time.perf_counter())
            elif announced and not console.is_terminal and time.perf_counter() - announced[-1] > 3 * _LONG:
                console.print(f"{answers} answers, {left}", highlight=False, soft_wrap=True)
                announced.append(time.perf_counter())

        yield show


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"
