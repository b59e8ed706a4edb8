"""Convert the configuration files of Axolotl and LLaMA-Factory to ftdata configurations.

    axolotl.yaml                       an Axolotl file, with its `datasets`
    train.yaml                         a LLaMA-Factory training file; `dataset_dir` contains its `dataset_info.json`
    dataset_info.json                  a LLaMA-Factory list of data sets; `datasets` selects from it

Keys have the same meaning as in Axolotl 0.19.0 and LLaMA-Factory 0.9.5. If ftdata would train other tokens than the
original tool, the result contains a note. A setting that ftdata cannot express is an error.
"""

from ftdata.importers.import_config import ImportedConfig, import_config

__all__ = ["ImportedConfig", "import_config"]
