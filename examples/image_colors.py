"""Train a vision-language model to name the colors of generated images.

    python examples/image_colors.py --model Qwen/Qwen2.5-VL-3B-Instruct

The images are packed together with their questions, and only the answers are trained.
"""

import json
import random
from pathlib import Path

import typer
from PIL import Image

import ftdata
from ftdata.train import run

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (245, 245, 245)}


def write_data(folder: Path, rows: int) -> Path:
    """Write images of one color in different sizes, and a conversation about each image."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    with (folder / "colors.jsonl").open("w") as file:
        for number in range(rows):
            name = generator.choice(list(COLORS))
            size = (generator.randrange(30, 120), generator.randrange(30, 120))
            Image.new("RGB", size, COLORS[name]).save(folder / f"{number}.png")
            question = [{"type": "image"}, {"type": "text", "text": "Which color is this?"}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": name}]
            file.write(json.dumps({"messages": messages, "images": [f"{number}.png"]}) + "\n")
    return folder / "colors.jsonl"


def main(
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct",
    output_dir: str = "out/image_colors",
    rows: int = 200,
    epochs: float = 3,
) -> None:
    data = str(write_data(Path(output_dir) / "images", rows))
    print(ftdata.preview(data, model, n=2))
    run(
        data,
        model=model,
        output_dir=f"{output_dir}/run",
        test_size=0.2,
        max_length=1024,
        packing="bfd",
        lora={"r": 16, "alpha": 32},
        settings={"num_train_epochs": epochs, "per_device_train_batch_size": 1, "learning_rate": 2e-4},
    )


if __name__ == "__main__":
    typer.run(main)
