"""First configuration (`ftdata init`): commented, its values worked out from data and model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ftdata.config import dump_yaml, make_config
from ftdata.errors import InputRefused, UsageError
from ftdata.inspection.stats import Stats, StatsGroup, stats
from ftdata.tokenizing.load import load_tokenizer
from ftdata.train.model import device
from ftdata.train.model.isolation_probe import has_leaking_architecture
from ftdata.train.model.load import load_model_config

_TEMPLATES = ("question_answer", "alpaca", "zephyr")
"""For tokenizers without a chat template: the one that shows most rows; none needs a token of its own."""

_TRIED = 50
_SMALL = 300_000_000
"""Parameters up to which all are trained: an adapter saves nothing that matters."""

_ROWS_PER_STEP = 16
_STEPS_PER_EPOCH = 50
_TOKENS_AT_ONCE = 8192


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What was looked at: the data's figures, and the model's."""

    figures: Stats
    template: str | None
    parameters: int
    positions: int | None
    leaks: bool | None
    kind: str

    @property
    def all(self) -> StatsGroup:
        """Figures of all rows."""
        return self.figures.groups[0]


def make_init_config(data: str, model: str, output_dir: str, overrides: Mapping[str, Any]) -> str:
    """Return the configuration as YAML; see `ftdata.train.init`."""
    if data == "-":
        raise UsageError("init", "standard input is there once, and a run reads it later", hint="name a file")
    given = {name: value for name, value in overrides.items() if value is not None}
    known = make_config({"data": data, "model": model, "output_dir": output_dir, **given})
    template = known.template or _template(data, known.tokenizer or model, known.limit)
    figures = stats(data, known.tokenizer or model, template, limit=known.limit, where=known.where)
    model_config = load_model_config(model, trust_remote_code=known.trust_remote_code)
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=known.trust_remote_code
        ).num_parameters()
    found = DataFacts(
        figures=figures,
        template=template,
        parameters=parameters,
        positions=getattr(model_config.get_text_config(), "max_position_embeddings", None),
        leaks=has_leaking_architecture(model_config, known.attn_implementation),
        kind=model_config.model_type,
    )
    parts = {
        "data": ("What is read: a file, glob, folder, URL or hub id, or a list of them.", data),
        "template": (_about_template(template), template),
        "mask": ("Which tokens carry the loss.", {"train_on": "assistant", "turns": "auto"}),
        "length": _length(found),
        "pack": _pack(found),
        **_bad_rows(found),
        "test_size": _test(found),
        "model": (f"The base model: {parameters:,} parameters.", model),
        **_weights(found),
        "train": ("Fields of TRL's SFTConfig.", _train(found)),
        "output_dir": ("Checkpoints, the model, the loss as a picture, samples.", output_dir),
    }
    for name in known.__struct_fields__:
        if name in given and name not in ("data", "model", "output_dir"):
            parts[name] = ("As it was asked for.", given[name])
    return "\n".join(_written(name, *part) for name, part in parts.items() if part is not None)


def _written(name: str, comment: str, value: Any) -> str:
    text = dump_yaml({name: value})
    return "".join(f"# {line}\n" for line in comment.splitlines()) + text


def _template(data: str, tokenizer: str, limit: int | None) -> str | None:
    if load_tokenizer(tokenizer).chat_template:
        return None
    few, refused = min(limit or _TRIED, _TRIED), {}
    for name in _TEMPLATES:
        try:
            refused[name] = sum(stats(data, tokenizer, name, limit=few).rejected.values())
        except InputRefused:
            continue
    return min(refused, key=lambda name: refused[name], default=_TEMPLATES[-1])


def _about_template(name: str | None) -> str:
    own = "a built-in name (`ftdata templates list`), a .jinja file, or Jinja text."
    if name is None:
        return f"null: the tokenizer's own chat template; or {own}"
    return f"The tokenizer has no chat template; {own}"


def _length(found: DataFacts) -> tuple[str, dict[str, Any]]:
    lengths, most = found.all.lengths, found.positions or 1 << 20
    wanted = -(-lengths[100] // 64) * 64
    said = (
        f"Tokens of an example: half have at most {lengths[50]:,}, 99 % at most {lengths[99]:,}, "
        f"the longest {lengths[100]:,}."
    )
    if wanted <= most:
        return f"{said} None is cut.", {"max_length": wanted, "overlong": "reject"}
    overlong = "drop_turns" if (found.all.turns or 0) > found.all.examples else "reject"
    return f"{said}\nThe model has {most:,} positions: longer ones are left out, and listed.", {
        "max_length": most,
        "overlong": overlong,
    }


def _pack(found: DataFacts) -> tuple[str, str | None]:
    if found.leaks:
        return f"{found.kind} lets packed documents see each other, so rows are padded instead.", None
    if found.leaks is None:
        return "bfd would put whole examples together; whether the model keeps them apart is not known.", None
    return "bfd: whole examples together, each seeing itself alone. null: one example a row.", "bfd"


def _bad_rows(found: DataFacts) -> dict[str, tuple[str, Any]]:
    bad = sum(found.figures.rejected.values())
    most = found.positions or 1 << 20
    longer = int((found.figures.seen.lengths > most).sum())
    if not bad and not longer:
        return {
            "on_bad_rows": ("error: bad rows end the build, all named. quarantine: it goes on without them.", "error")
        }
    codes = [f"{count:,} {code}" for code, count in found.figures.rejected.items()]
    codes += [f"{longer:,} too long, but for those of which turns fit"] * bool(longer)
    said = f"Of {found.figures.rows:,} rows these are left out, and listed in rejects.jsonl: {', '.join(codes)}."
    return {
        "on_bad_rows": (said, "quarantine"),
        "max_rejects": ("More would end the build.", bad + longer),
    }


def _test(found: DataFacts) -> tuple[str, int | None]:
    if any(group.of == "split" and group.name not in ("train", "all") for group in found.figures.groups):
        return "The data has a split for testing.", None
    if found.all.rows < 20:
        return "Rows held out for testing: there are too few to spare any.", None
    return "Rows held out, chosen by seed: for the evaluation, and for `ftdata eval`.", min(found.all.rows // 10, 500)


def _weights(found: DataFacts) -> dict[str, tuple[str, Any]]:
    if found.parameters <= _SMALL:
        return {"lora": ("null: all weights are trained; {r: 16, alpha: 32} would train an adapter.", None)}
    lora = ("A LoRA adapter on all linear layers.", {"r": 16, "alpha": 32, "dropout": 0.05})
    if not torch.cuda.is_available():
        return {"lora": lora, "quantization": ("nf4 (QLoRA) would hold the model in a fourth of the memory.", None)}
    fits = 2 * found.parameters < 0.4 * device.free_memory()
    said = "null: the model in 16 bits fits; nf4 (QLoRA) takes a fourth." if fits else "The model in 4 bits (QLoRA)."
    return {"lora": lora, "quantization": (said, None if fits else "nf4")}


def _train(found: DataFacts) -> dict[str, Any]:
    length = _length(found)[1]["max_length"]
    packed = _pack(found)[1] is not None
    rows = max(1, found.all.tokens // length if packed else found.all.examples)
    each = length if packed else max(1, found.all.tokens // max(found.all.examples, 1))
    wanted = min(max(rows // _STEPS_PER_EPOCH, 1), _ROWS_PER_STEP)
    at_once = min(max(_TOKENS_AT_ONCE // each, 1), wanted)
    epochs = 1 if found.all.tokens > 20_000_000 else 3
    steps = max(1, epochs * rows // wanted)
    return {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": -(-wanted // at_once),
        "learning_rate": 5e-5 if found.parameters <= _SMALL else 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, round(0.03 * steps)),
        "logging_steps": max(1, min(10, steps // 20)),
    }
