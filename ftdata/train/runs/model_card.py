"""Create the model card of a run: data, loss mask, results, and the command that reproduces the run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftdata._version import __version__
from ftdata.config import Config, Lora, to_yaml
from ftdata.redaction import redact_text
from ftdata.templates.python_template import is_python_template


def render_model_card(config: Config, metadata: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Return the text of the `README.md` of a trained model.

    Secrets are redacted, because users upload the file with the model.

    Args:
        config: the configuration of the run.
        metadata: the content of `run.json` of the finished run.
        manifest: the manifest of the build that the model was trained on.
    """
    base = "" if Path(config.model).is_dir() else f"base_model: {redact_text(config.model)}\n"
    library = "library_name: peft\n" if metadata["adapter"] else "library_name: transformers\n"
    facts = "".join(f"| {name} | `{_cell(value)}` |\n" for name, value in _facts(config, metadata, manifest))
    config_yaml = to_yaml(config, redacted=True)
    results = "".join(f"| {name} | {value} |\n" for name, value in _results(metadata))
    pipeline = "text-classification" if config.task == "reward" else "text-generation"
    return (
        f"---\n{base}{library}pipeline_tag: {pipeline}\ntags:\n- {config.task}\n- ftdata\n---\n\n"
        f"# {Path(config.output_dir).name}\n\n"
        f"{Path(config.model).name}, fine-tuned by ftdata.\n\n## Data and mask\n\n| | |\n|---|---|\n{facts}\n"
        f"## Results\n\n| | |\n|---|---|\n{results}\n"
        f"## Reproduce\n\n```\nftdata train config.yaml\n```\n\nwith this `config.yaml`:\n\n"
        f"```yaml\n{config_yaml}```\n\n## Usage\n\n```python\n{_usage(config, adapter=metadata['adapter'])}```\n"
        f"{_serving(config, manifest['options'], adapter=metadata['adapter'])}"
    )


def _facts(config: Config, metadata: Mapping[str, Any], manifest: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    options = manifest["options"]
    yield "data", config.data
    yield "data fingerprint", metadata["fingerprint"]
    yield "rows, tokens, trained tokens", "{rows:,}, {tokens:,}, {trained_tokens:,}".format(**metadata["estimate"])
    yield "tokenizer", options["tokenizer"]["name"]
    yield "template", options["template"]["name"]
    yield "mask policy", ", ".join([options["train_on"], *(options["train_parts"] or ())])
    yield "max_length", options["max_length"]
    yield "packing", options["packing"]
    yield "stop tokens", ", ".join(metadata["stops"]) or "none"
    yield "ftdata", __version__


def _results(metadata: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "steps", metadata["steps"]
    if metadata["loss"]:
        yield "first and last training loss", f"{metadata['loss'][0]:.4f}, {metadata['loss'][-1]:.4f}"
    if metadata.get("test_loss") is not None:
        yield f"test loss{' per trained token' if metadata.get('perplexity') else ''}", f"{metadata['test_loss']:.4f}"
    if metadata.get("perplexity") is not None:
        yield "test perplexity", f"{metadata['perplexity']:.3f}"
    if metadata.get("reward_accuracy") is not None:
        yield "test reward accuracy", f"{metadata['reward_accuracy']:.1%}"
        yield "test reward margin", f"{metadata['reward_margin']:.4f}"


def _usage(config: Config, *, adapter: bool) -> str:
    head = "SequenceClassification" if config.task == "reward" else "CausalLM"
    kind = f"AutoPeftModelFor{head}" if adapter else f"AutoModelFor{head}"
    package = "peft" if adapter else "transformers"
    folder = repr(f"{config.output_dir}/model")
    more = ", num_labels=1" if adapter and config.task == "reward" else ""
    return (
        f"from transformers import AutoTokenizer\nfrom {package} import {kind}\n\n"
        f"model = {kind}.from_pretrained({folder}{more})\ntokenizer = AutoTokenizer.from_pretrained({folder})\n"
    )


def _serving(config: Config, options: Mapping[str, Any], *, adapter: bool) -> str:
    """Return the section on serving the model with vLLM, with the template and the stop tokens of the training."""
    if config.task == "reward":
        return ""
    if is_python_template(options["template"]["name"]):
        name = Path(options["template"]["name"]).name
        return f"\n## Serving\n\nRender prompts with the function `{name}`: the model has no chat template.\n"
    folder = shlex.quote(f"{config.output_dir}/model")
    command = f"vllm serve {folder}"
    if adapter:
        rank = config.lora.r if config.lora is not None else Lora().r
        command = (
            f"vllm serve {shlex.quote(redact_text(config.model))} --enable-lora --max-lora-rank {rank} \\\n"
            f"  --lora-modules tuned={folder} --tokenizer {folder} --generation-config {folder} \\\n"
            f"  --chat-template {folder}/chat_template.jinja"
        )
    kwargs = options["template"].get("kwargs")
    note = f"\nSend `chat_template_kwargs: {json.dumps(kwargs)}` with each request.\n" if kwargs else ""
    audit = f"ftdata audit DATA --tokenizer {folder} --serve http://localhost:8000"
    return f"\n## Serving\n\n```\n{command}\n```\n{note}\nCompare the server with the training: `{audit}`\n"


def _cell(value: object) -> str:
    return re.sub(r"[\r\n]+", " ", redact_text(str(value))).replace("|", r"\|")
