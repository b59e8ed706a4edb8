"""Confirm the export formats: read each export with the loader of its trainer, and compare it with the build.

    python benchmarks/exporters/run.py --tokenizer FOLDER --data chats.jsonl --packages DIR --json results.json

The data is built unpacked and packed, and exported to each format. `confirm/read_FORMAT.py` reads the export with the
code of the trainer, in a process of its own with the packages in DIR/FORMAT. All documents, targets and document
boundaries must be equal to those of the build. Where the trainer can compute a loss on a CPU, it must match the
loss that PyTorch computes for each document separately.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from packages import PACKAGES

from ftdata.build.dataset import write_build
from ftdata.build.read_packs import list_pack_files, read_pack_file
from ftdata.types import IGNORE_INDEX

HERE = Path(__file__).parent
TOLERANCE = 1e-5
NEED_PACKAGES = frozenset({*PACKAGES, "megatron_bridge"})
"""Formats whose trainers the extra `train` of ftdata does not install."""


def make_model(tokenizer: str, folder: Path) -> None:
    """Save a tiny random model with the given tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=-(-len(loaded) // 64) * 64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=8192,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    loaded.save_pretrained(folder)


def read_build(folder: Path, split: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield the token ids and the targets of each document in a build."""
    for path in list_pack_files(folder, split):
        for packs in read_pack_file(path):
            for start, end in pairwise(packs.token_bounds.tolist()):
                ids, labels = packs.ids[start:end].astype(np.int64), packs.labels[start:end].astype(np.int64)
                yield ids.tobytes(), labels[1:].tobytes()


def read_confirmed(file: Path) -> tuple[Counter[tuple[bytes, bytes]], Mapping[str, Any]]:
    """Read the output of a script in `confirm/`: the documents with their counts, and the version and losses."""
    content = np.load(file)
    bounds = np.append(0, np.cumsum(content["lengths"]))
    ids, targets = content["ids"], content["targets"]
    documents = Counter(
        (ids[start:end].tobytes(), targets[start - number : end - number - 1].tobytes())
        for number, (start, end) in enumerate(pairwise(bounds.tolist()))
    )
    return documents, json.loads(str(content["about"]))


class Reference:
    """Computes the loss of documents with PyTorch, one document at a time."""

    def __init__(self, model: Path, build: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.model = torch, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.targets = dict(read_build(build, "train"))

    def loss(self, documents: list[list[int]]) -> float:
        """Return the mean loss of all trained tokens of the documents."""
        total, count = 0.0, 0
        for ids in documents:
            targets = np.frombuffer(self.targets[np.asarray(ids, np.int64).tobytes()], np.int64)
            with self.torch.no_grad():
                logits = self.model(self.torch.tensor([ids])).logits[0, :-1].double()
            labels = self.torch.tensor(targets.copy())
            total += float(self.torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((targets != IGNORE_INDEX).sum())
        return total / count


def run_script(command: list[str | Path], *search_path: Path) -> str:
    """Run a script in the folder of its output with additional folders on the Python path. Return its output."""
    paths = os.pathsep.join(map(str, search_path))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(  # noqa: S603  (our own scripts)
        list(map(str, command)), capture_output=True, text=True, check=True, env=environment,
        cwd=Path(command[-1]).parent,
    )  # fmt: skip
    return done.stdout


def confirm(
    name: str, build: Path, folder: Path, model: Path, packages: Path, python: str, reference: Reference
) -> dict[str, Any]:
    """Export a build, read the export with the trainer's code, and compare the result with the build."""
    output = folder.with_suffix(".npz")
    try:
        text = run_script([python, HERE / "export_twice.py", build, name, folder], packages / name, HERE / "stubs")
        result: dict[str, Any] = json.loads(text.splitlines()[-1])
        script = HERE / "confirm" / f"read_{name}.py"
        run_script([python, script, folder, model, output], packages / name, HERE / "confirm")
    except subprocess.CalledProcessError as error:
        return {"failed": (error.stderr or error.stdout).strip().splitlines()[-1:]}
    documents, about = read_confirmed(output)
    expected = Counter(read_build(build, "train"))
    result |= {
        "version": about["version"],
        "documents": expected.total(),
        "missing": (expected - documents).total(),
        "unexpected": (documents - expected).total(),
        "loss_difference": None,
    }
    if documents == expected:
        differences = (abs(batch["loss"] - reference.loss(batch["documents"])) for batch in about["losses"])
        result["loss_difference"] = max(differences, default=None)
    return result


def main() -> None:
    """Confirm the formats, and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer with a chat template")
    parser.add_argument("--data", required=True, help="file with conversations")
    parser.add_argument("--packages", type=Path, default=Path("out/exporters"), help="a folder of packages per format")
    parser.add_argument("--formats", default="", help="names of formats, separated by commas (default: all scripts)")
    parser.add_argument("--python", default=sys.executable, help="Python interpreter for the scripts")
    parser.add_argument("--json", type=Path, help="add the results to this file")
    options = parser.parse_args()
    scripts = sorted(path.stem.removeprefix("read_") for path in (HERE / "confirm").glob("read_*.py"))
    names = options.formats.split(",") if options.formats else scripts
    for name in NEED_PACKAGES.intersection(names):
        if not (options.packages / name).is_dir():
            print(f"{name:20} skipped: {options.packages / name} does not exist", flush=True)
            names.remove(name)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        model = home / "model"
        make_model(options.tokenizer, model)
        for kind, layout in {"unpacked": {}, "packed": {"packing": "bfd"}}.items():
            build = home / kind
            write_build(
                options.data, str(model), build, max_length=2048, overlong="drop_turns", test_size=16,
                on_bad_rows="quarantine", max_rejects=1.0, **layout,
            )  # fmt: skip
            reference = Reference(model, build)
            for name in names:
                target = home / f"{kind}-{name}"
                result = confirm(name, build, target, model, options.packages, options.python, reference)
                results.setdefault(name, {})[kind] = result
                is_equal = not result.get("failed") and not result["missing"] + result["unexpected"]
                is_close = (result.get("loss_difference") or 0) <= TOLERANCE
                verdict = "confirmed" if is_equal and is_close else "DIFFERS"
                print(f"{name:20} {kind:9} {verdict:10} {json.dumps(result)}", flush=True)
    if options.json:
        earlier = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        text = json.dumps({**earlier, **results}, indent=1, sort_keys=True)
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
