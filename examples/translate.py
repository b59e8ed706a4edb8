r"""Train Gemma 2B in 4 bits to translate modern Chinese into classical Chinese.

    python examples/translate.py --data data.json

`data.json` is a list of `{"instruction": "第二年召迴朝廷，…\n翻譯成文言文：", "output": "明年召還，…"}`. The notebook
`train.ipynb` contains the same example.
"""

import typer
from rich.console import Console

import ftdata
from ftdata.train import compare, run

# A base model has no chat template. The tokenizer adds BOS before the rendered text.
TEMPLATE = "{{ instruction }}{% generation %}{{ output }}{{ eos_token }}{% endgeneration %}"


def main(
    data: str = "data.json",
    model: str = "google/gemma-2b",
    output_dir: str = "out/translate",
    epochs: float = 3,
    resume: bool = False,
) -> None:
    console = Console()
    ftdata.preview(data, model, TEMPLATE, n=2).print(console)
    folder = run(
        data,
        model=model,
        output_dir=output_dir,
        template=TEMPLATE,
        test_size=0.1,
        quantization="nf4",
        lora={"r": 8, "alpha": 16, "dropout": 0.05},
        settings={"num_train_epochs": epochs, "per_device_train_batch_size": 2, "save_strategy": "epoch"},
        resume=resume,
    )
    compare(folder, n=5, max_new_tokens=128).print(console)


if __name__ == "__main__":
    typer.run(main)
