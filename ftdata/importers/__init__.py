"""Configurations of other tools, as configurations of ours: what they say is carried over, or named.

    axolotl.yaml                       Axolotl's file, with its `datasets`
    train.yaml                         LLaMA-Factory's training file; `dataset_info.json` lies where it says
    dataset_info.json                  LLaMA-Factory's list of data sets; `datasets` says which

Keys mean what they do in Axolotl 0.19.0 and LLaMA-Factory 0.9.5. What would train other tokens than people expect of
the file is a note; what cannot be said in ours is refused.
"""

from ftdata.importers.import_config import ImportedConfig, import_config

__all__ = ["ImportedConfig", "import_config"]
