"""Read an export with the template of ms-swift that the export contains, and the collator of ms-swift."""

import runpy
from importlib.metadata import version

import common
import torch
from datasets import load_from_disk

BATCH_SIZE, LOSS_BATCHES = 4, 2


def main() -> None:
    """Encode all rows of the cached data set as `swift sft` does."""
    export, model, output = common.arguments()
    runpy.run_path(str(export / "template.py"))
    from swift.model import get_model_processor
    from swift.template import get_template

    loaded, processor = get_model_processor(str(model), torch_dtype=torch.float32, model_type="qwen3", device_map="cpu")
    template = get_template(processor, template_type="ftdata_tokens", max_length=8192)
    template.set_mode("train")
    rows = load_from_disk(str(export / "train"))
    documents, losses = [], []
    for start in range(0, len(rows), BATCH_SIZE):
        encoded = [template.encode(rows[index]) for index in range(start, min(start + BATCH_SIZE, len(rows)))]
        batch = template.data_collator(encoded)
        batch_rows = []
        for ids, mask, labels in zip(
            *(batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")), strict=True
        ):
            length = sum(mask)
            assert set(labels[length:]) <= {common.IGNORE_INDEX}
            batch_rows.append(ids[:length])
            documents.append((ids[:length], common.shift(labels[:length])[:-1]))
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                names = ("input_ids", "attention_mask", "labels")
                losses.append((batch_rows, float(loaded.eval()(**{name: batch[name] for name in names}).loss)))
    common.save(output, documents, f"ms-swift {version('ms-swift')}", losses)


if __name__ == "__main__":
    main()
