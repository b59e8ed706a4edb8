"""Read an export from SkyRL's cache of tokenized data, with its collator."""

import runpy
import sys
import typing
from importlib.metadata import version

import common
import typing_extensions

# SkyRL requires Python 3.12, whose TypedDict has the attributes that pydantic reads.
typing.TypedDict = typing_extensions.TypedDict

BATCH_SIZE = 4


def main() -> None:
    """Link the export into a cache with the script that it contains, and read all batches."""
    export, model, output = common.arguments()
    from skyrl.train import sft_trainer
    from transformers import AutoTokenizer

    cache = output.with_suffix(".cache")
    sys.argv = ["link_cache.py", f"model.path={model}", "max_length=4096", f"cache_dir={cache}"]
    runpy.run_path(str(export / "link_cache.py"), run_name="__main__")
    key = sft_trainer._compute_cache_key(
        "ftdata", "train", str(model), 4096, "messages", "all_assistant_messages", None, None
    )
    rows = sft_trainer._load_from_cache(sft_trainer._get_cache_path(str(cache), key))
    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = sft_trainer.collate_sft_batch(rows[start : start + BATCH_SIZE], tokenizer)
        for ids, attention, mask in zip(
            *(batch[name].tolist() for name in ("sequences", "attention_mask", "loss_mask")), strict=True
        ):
            tokens = ids[len(ids) - sum(attention) :]
            # The last values of the mask belong to the last tokens of the left-padded sequence.
            trained = mask[-(len(tokens) - 1) :]
            assert not any(mask[: -(len(tokens) - 1)])
            targets = [token if flag else common.IGNORE_INDEX for token, flag in zip(tokens[1:], trained, strict=True)]
            documents.append((tokens, targets))
    common.save(output, documents, f"SkyRL {version('skyrl')}")


if __name__ == "__main__":
    main()
