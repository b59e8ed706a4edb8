"""Read an export with `datasets.load_dataset`."""

import common
import datasets


def main() -> None:
    """Read all rows, and check that positions and document numbers agree."""
    export, _, output = common.arguments()
    files = {"train": str(export / "train-*.parquet")}
    rows = datasets.load_dataset("parquet", data_files=files, cache_dir=str(output.with_suffix(".cache")))["train"]
    documents = []
    for row in rows:
        numbers = [int(position == 0) for position in row["position_ids"]]
        assert sum(numbers) == row["document_ids"][-1]
        documents += common.split_by_positions(row["input_ids"], common.shift(row["labels"]), row["position_ids"])
    common.save(output, documents, f"datasets {datasets.__version__}")


main()
