"""Train Gemma 2 9B on every assistant turn of multi-turn conversations.

    python examples/conversations.py --data conversations.json

`conversations.json` is a list of conversations, each a list of `{"role": "user" or "assistant", "content": ...}`.
You do not configure role markers, a padding token or stop tokens: ftdata detects them from the model's chat template.
"""

import typer

import ftdata
from ftdata.train import run, start_chat


def main(
    data: str = "conversations.json",
    model: str = "google/gemma-2-9b-it",
    output_dir: str = "out/conversations",
    epochs: float = 3,
    max_length: int = 2048,
    four_bits: bool = True,
) -> None:
    print(ftdata.check_template(model))
    print(ftdata.preview(data, model, n=1))
    folder = run(
        data,
        model=model,
        output_dir=output_dir,
        max_length=max_length,
        overlong="drop_turns",
        quantization="nf4" if four_bits else None,
        lora={"r": 16, "alpha": 32},
        settings={
            "num_train_epochs": epochs,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "train_sampling_strategy": "group_by_length",
            "activation_checkpointing": True,
        },
    )
    talk = start_chat(folder, max_new_tokens=64)
    for question in ("Hello! Who are you?", "And what did I just ask?"):
        print(f"> {question}\n{talk.say(question)}")


if __name__ == "__main__":
    typer.run(main)
