"""Read an export with `datasets.load_dataset`, and tokenize the text with the tokenizer of transformers."""

import common
import datasets
import transformers


def main() -> None:
    """Convert the spans of all rows to labels, as the README of the export describes."""
    export, model, output = common.arguments()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    files = {"train": str(export / "train-*.parquet")}
    rows = datasets.load_dataset("parquet", data_files=files, cache_dir=str(output.with_suffix(".cache")))["train"]
    documents = []
    for row in rows:
        encoding = tokenizer(row["text"], add_special_tokens=False, return_offsets_mapping=True)
        labels = [
            token if any(first < end <= last for first, last in row["trained_spans"]) else common.IGNORE_INDEX
            for token, (_, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        ]
        documents.append((encoding["input_ids"], labels[1:]))
    common.save(output, documents, f"transformers {transformers.__version__}")


main()
