"""Train Pythia-70m to answer questions about the documentation of a company.

    python examples/company_faq.py

The example previews two corpora, exports prompts and completions, estimates and trains a model, and evaluates it. A cell
may be an object with a single value, such as `{"question": {"0": "How can I …"}}`. ftdata then reads this value.
"""

from itertools import islice
from pathlib import Path

import typer
from rich.console import Console

import ftdata
from ftdata.train import compare, dry_run, generate, run

QUESTION = "Can Lamini generate technical documentation or user manuals for software projects?"


def look(*places: dict[str, object]) -> None:
    """Show the first rows of corpora without downloading them."""
    for place in places:
        print(f"\n{place['path']}")
        for row in islice(ftdata.read({**place, "streaming": True}), 5):
            print(f"  {str(row.data)[:100]}")


def main(
    data: str = "lamini/lamini_docs",
    model: str = "EleutherAI/pythia-70m",
    output_dir: str = "out/company_faq",
    max_steps: int = 420,
    pairs: str = "out/company_faq.jsonl",
) -> None:
    console = Console()
    look({"path": "allenai/c4", "data_files": "en/c4-train.00000-of-01024.json.gz"}, {"path": "tatsu-lab/alpaca"})
    Path(pairs).parent.mkdir(parents=True, exist_ok=True)
    print(ftdata.convert({"path": data, "split": "train"}, pairs, to="prompt_completion"))
    settings = {
        "learning_rate": 1e-5,
        "optim": "adafactor",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
        "warmup_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 120,
        "save_strategy": "steps",
        "save_steps": 120,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
    }
    common = {"model": model, "template": "question_answer", "max_length": 2048}
    print(dry_run(data, output_dir=output_dir, settings=settings, **common)[0])
    for steps in (min(3, max_steps), max_steps):
        folder = run(
            data, output_dir=f"{output_dir}_{steps}_steps", settings={**settings, "max_steps": steps}, **common
        )
        before, after = (generate(folder, [QUESTION], base=base, max_new_tokens=100)[0] for base in (True, False))
        console.print(f"[bold]{steps} steps[/]\nbefore: {before}\nafter:  {after}", highlight=False)
    compare(folder, n=10, max_new_tokens=100).print(console)


if __name__ == "__main__":
    typer.run(main)
