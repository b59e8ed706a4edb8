"""Read an export with `StreamingDataset` and `StreamingDataLoader`, and compute losses with transformers.

The package has no loss, so this script passes the columns of a batch to the model.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import common
import torch
import transformers

LOSS_BATCHES = 2


def stub_torchvision() -> None:
    """Add empty modules for torchvision: `import streaming` imports the data sets for images, which are not used."""
    for name, contents in {
        "torchvision": {},
        "torchvision.datasets": {"VisionDataset": object},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"to_tensor": None},
    }.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        vars(module).update(contents)
        sys.modules[name] = module


def main() -> None:
    """Read all batches of one row."""
    export, model, output = common.arguments()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    stub_torchvision()
    import streaming

    data = streaming.StreamingDataset(local=str(export / "train"), batch_size=1, shuffle=False)
    documents, losses = [], []
    for batch in streaming.StreamingDataLoader(data, batch_size=1):
        ids, labels, positions = (batch[name][0].tolist() for name in ("input_ids", "labels", "position_ids"))
        row = common.split_by_positions(ids, common.shift(labels), positions)
        documents += row
        if len(losses) < LOSS_BATCHES:
            with torch.no_grad():
                # The loss needs labels of type int64. With a cache, transformers ignores the boundaries of documents.
                columns = {name: values.long() for name, values in batch.items()}
                losses.append(([document for document, _ in row], float(loaded(**columns, use_cache=False).loss)))
    common.save(output, documents, f"mosaicml-streaming {streaming.__version__}", losses)


main()
