"""Train Llama 2 with LoRA on two kinds of data sets from the Hub: formatted texts, and messages with a prompt.

    python examples/text_field.py guanaco        # one `text` column: `<s>[INST] ... [/INST] ... </s>`
    python examples/text_field.py ultrachat      # `messages`, with splits `train_sft` and `test_sft`

Formatted text gets no second BOS or EOS. After training, the example loads the adapter and generates an answer.
"""

from typing import Any

import typer
from rich.console import Console

import ftdata
from ftdata.train import compare, generate, run

DATA: dict[str, Any] = {
    "guanaco": {"path": "mlabonne/guanaco-llama2-1k"},
    "medquad": {"path": "prsdm/MedQuad-phi2-1k"},
    "ultrachat": {"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"},
}


def main(
    shape: str = "guanaco",
    model: str = "NousResearch/Llama-2-7b-chat-hf",
    output_dir: str = "out/text_field",
    epochs: float = 1,
) -> None:
    print(ftdata.preview(DATA[shape], model, n=1))
    folder = run(
        DATA[shape],
        model=model,
        output_dir=f"{output_dir}/{shape}",
        max_length=1024,
        overlong="drop_turns" if shape == "ultrachat" else "truncate",
        packing="bfd",
        lora={"r": 16, "alpha": 32, "dropout": 0.05},
        settings={"num_train_epochs": epochs, "per_device_train_batch_size": 4, "learning_rate": 2e-4},
    )
    if shape == "ultrachat":
        compare(folder, {**DATA[shape], "split": "test_sft"}, n=20, max_new_tokens=128).print(Console())
    print(*generate(folder, ["What is a large language model?"], max_new_tokens=64))


if __name__ == "__main__":
    typer.run(main)
