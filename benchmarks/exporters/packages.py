"""Install the packages of each trainer for `run.py`, without their dependencies, into a folder for each format.

    python benchmarks/exporters/packages.py DIR

The folders contain only packages that the extra `train` of ftdata does not install. The version of Megatron-Bridge that
reads the export is not on PyPI: check out its repository, with its Megatron-LM commit, into DIR/megatron_bridge.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "axolotl": "axolotl==0.19.0 addict==2.4.0 posthog==7.91.1 distro==1.9.0 numba==0.68.1 llvmlite==0.50.0",
    "datatrove": "datatrove==0.10.1 loguru==0.7.3 humanize==4.17.0",
    "litgpt": "litgpt==0.5.13 lightning==2.6.0 lightning-utilities==0.15.3 torchmetrics==1.9.0 jsonargparse==4.53.0",
    "llamafactory": "llamafactory==0.9.5 omegaconf==2.4.0",
    "megatron_lm": "megatron-core==0.16.1",
    "mlx_lm": "mlx-lm==0.32.0 mlx==0.32.2 mlx-cpu==0.32.2",
    "mosaicml_streaming": "mosaicml-streaming==0.13.0 brotli==1.2.1 catalogue==2.0.10 "
    "python-snappy==0.7.3 cramjam==2.14.0 zstd==1.5.7.2",
    "ms_swift": "ms-swift==4.6.0 modelscope==1.40.2 modelscope-hub==0.5.1 json_repair==0.64.6",
    "nemo_automodel": "nemo_automodel==0.7.0 torchdata==0.11.0 torchao==0.16.0",
    "skyrl": "skyrl==0.3.0 skyrl-gym==0.4.0 loguru==0.7.3 torchdata==0.11.0 jaxtyping==0.3.11 "
    "omegaconf==2.4.0 httpx==0.28.1",
    "tinker": "tinker==0.38.0 httpx==0.28.1 httpcore==1.0.9 h11==0.16.0 anyio==4.16.0 sniffio==1.3.1 distro==1.9.0",
    "torchtune": "torchtune==0.6.1 torchao==0.10.0 torchdata==0.11.0 omegaconf==2.4.0 antlr4-python3-runtime==4.9.3 "
    "sentencepiece==0.2.1 tiktoken==0.12.0",
    "verl": "verl==0.9.1 tensordict==0.10.0 pyvers==0.2.3 cloudpickle==3.1.3 omegaconf==2.3.0 "
    "hydra-core==1.3.2 antlr4-python3-runtime==4.9.3 codetiming==1.4.0",
}
"""The packages of each format. The other formats need no further packages."""


def main() -> None:
    """Install all packages."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]
    for name, packages in PACKAGES.items():
        subprocess.run([*pip, "--target", str(Path(sys.argv[1]) / name), *packages.split()], check=True)  # noqa: S603  (pip)


if __name__ == "__main__":
    main()
