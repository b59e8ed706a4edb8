"""Train OPT-350m with LoRA on code instructions, and compare the base and the tuned model with SacreBLEU.

    python examples/code_alpaca.py

The data set has 20,022 rows. The example keeps the rows with an empty input, and holds out a fifth of them as a test
split (seed 42). Only the response is trained. The rows are padded, because packed documents of OPT attend to each other.
"""

import typer
from rich.console import Console

from ftdata.train import compare, run


def main(
    data: str = "sahil2801/CodeAlpaca-20k",
    model: str = "facebook/opt-350m",
    output_dir: str = "out/code_alpaca",
    epochs: float = 10,
    rows: int = 200,
    max_new_tokens: int = 256,
) -> None:
    folder = run(
        data,
        model=model,
        output_dir=output_dir,
        template="instruction_response",
        where="not input",
        shuffle=True,
        test_size=0.2,
        seed=42,
        max_length=1024,
        on_bad_rows="quarantine",
        max_rejects="1%",
        lora={"r": 16, "alpha": 32, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]},
        settings={
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 2,
            "save_strategy": "epoch",
            "eval_strategy": "epoch",
        },
    )
    report = compare(folder, n=rows, num_beams=5, early_stopping=True, max_new_tokens=max_new_tokens)
    report.write_html(folder / "eval.html")
    console = Console()
    for row in report.rows[:3]:
        for name in ("prompt", "expected", "tuned"):
            console.rule(name)
            console.print(getattr(row, name), markup=False, highlight=False)
    for name, base, tuned in report.scores():
        console.print(f"{name:12} base {base:>8}  tuned {tuned:>8}", highlight=False)
    console.print(f"chart of the loss: {folder / 'loss.png'}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
