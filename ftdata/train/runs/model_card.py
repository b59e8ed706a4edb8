"""Card: what a model was trained on and how, what came of it, and the command that does it again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftdata._version import __version__
from ftdata.config import Config, to_yaml
from ftdata.redaction import redact_text


def render_model_card(config: Config, about: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return a model's `README.md`, without secrets: it is uploaded with the model.

    Args:
        config: the run.
        about: what `run.json` says of it when it is finished.
        manifest: that of the build it was trained on.
    """
    base = "" if Path(config.model).is_dir() else f"base_model: {redact_text(config.model)}\n"
    library = "library_name: peft\n" if about["adapter"] else "library_name: transformers\n"
    facts = "".join(f"| {name} | `{_cell(value)}` |\n" for name, value in _facts(config, about, manifest))
    again = to_yaml(config, redacted=True)
    results = "".join(f"| {name} | {value} |\n" for name, value in _results(about))
    return (
        f"---\n{base}{library}pipeline_tag: text-generation\ntags:\n- sft\n- ftdata\n---\n\n"
        f"# {Path(config.output_dir).name}\n\n"
        f"{Path(config.model).name}, fine-tuned by ftdata.\n\n## Data and mask\n\n| | |\n|---|---|\n{facts}\n"
        f"## Results\n\n| | |\n|---|---|\n{results}\n"
        f"## Again\n\n```\nftdata train config.yaml\n```\n\nwith this as `config.yaml`:\n\n"
        f"```yaml\n{again}```\n\n## Use\n\n```python\n{_use(config, adapter=about['adapter'])}```\n"
    )


def _facts(config: Config, about: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    options = manifest["options"]
    yield "data", config.data
    yield "fingerprint of the data", about["fingerprint"]
    yield "rows, tokens, trained tokens", "{rows:,}, {tokens:,}, {trained_tokens:,}".format(**about["estimate"])
    yield "tokenizer", options["tokenizer"]["name"]
    yield "template", options["template"]["name"]
    yield "trained on", ", ".join([options["train_on"], *(options["train_parts"] or ())])
    yield "max_length", options["max_length"]
    yield "packing", options["packing"]
    yield "stops at", ", ".join(about["stops"]) or "nothing that was trained"
    yield "ftdata", __version__


def _results(about: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "steps", about["steps"]
    if about["loss"]:
        yield "loss, first and last", f"{about['loss'][0]:.4f}, {about['loss'][-1]:.4f}"
    if about.get("test_loss") is not None:
        yield "test loss per trained token", f"{about['test_loss']:.4f}"
        yield "test perplexity", f"{about['perplexity']:.3f}"


def _use(config: Config, *, adapter: bool) -> str:
    kind = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    package = "peft" if adapter else "transformers"
    folder = repr(f"{config.output_dir}/model")
    return (
        f"from transformers import AutoTokenizer\nfrom {package} import {kind}\n\n"
        f"model = {kind}.from_pretrained({folder})\ntokenizer = AutoTokenizer.from_pretrained({folder})\n"
    )


def _cell(value: object) -> str:
    return re.sub(r"[\r\n]+", " ", redact_text(str(value))).replace("|", r"\|")
