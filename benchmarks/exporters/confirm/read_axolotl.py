"""Read an export with Axolotl's loader, through the lines of `axolotl.yaml`, and its packing collator."""

from importlib.metadata import version

import common
import yaml


def main() -> None:
    """Load the data as `axolotl train` does."""
    export, model, output = common.arguments()
    from axolotl.utils.data.sft import prepare_datasets
    from axolotl.utils.dict import DictDefault
    from transformers import AutoTokenizer

    lines = yaml.safe_load((export / "axolotl.yaml").read_text())
    settings = {"seed": 0, "base_model": str(model), "num_epochs": 1, "micro_batch_size": 1, "world_size": 1}
    settings |= {"gradient_accumulation_steps": 1, "batch_size": 1, "val_set_size": 0, "model_config_type": "qwen3"}
    settings |= {
        "dataset_num_proc": 1,
        "sample_packing_group_size": 100000,
        "sample_packing_bin_size": 200,
        "flash_attention": True,
    }
    config = DictDefault({**settings, **lines, "dataset_prepared_path": str(output.with_suffix(".prepared"))})
    config["datasets"] = [DictDefault(item) for item in config["datasets"]]
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = prepare_datasets(config, tokenizer)[0]
    documents = []
    for row in data:
        assert len(row["input_ids"]) == len(row["attention_mask"]) == sum(row["attention_mask"])
        documents.append((row["input_ids"], common.shift(row["labels"])[:-1]))
    common.save(output, documents, f"Axolotl {version('axolotl')}")


if __name__ == "__main__":
    main()
