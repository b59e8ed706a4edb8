"""Generate a commented training configuration for the user's data and model (`ftdata init`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ftdata.config import make_config
from ftdata.errors import InputRefused, UsageError, count_noun
from ftdata.inspection.stats import Stats, StatsGroup, stats
from ftdata.options import select_options
from ftdata.pipeline.recipe import Options, resolve_task
from ftdata.readers import resolve_sources
from ftdata.tokenizing.load import load_tokenizer
from ftdata.train.model import device
from ftdata.train.model.isolation_probe import has_leaking_architecture
from ftdata.train.model.load import load_model_config
from ftdata.train.model.trainer_tasks import TRAINER_TASKS, find_model_class
from ftdata.types import SIDES
from ftdata.yaml12 import dump_yaml

_TEMPLATES = ("question_answer", "alpaca", "zephyr")
"""Templates for tokenizers without a chat template; none of them needs additional tokens."""

_TRIAL_ROWS = 50
_SMALL_MODEL = 300_000_000
"""Number of parameters up to which all weights are trained, because an adapter would save little memory."""

_SMALL_MODEL_RATE = 5e-5
"""Learning rate of supervised fine-tuning of all weights of a small model."""

_ROWS_PER_STEP = 16
_STEPS_PER_EPOCH = 50
_MAX_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class DataFacts:
    """Properties of the data and the model that determine the values in the generated configuration.

    Attributes:
        statistics: the statistics of the data.
        template: the template, or `None` for the chat template of the tokenizer.
        parameters: number of parameters of the model.
        positions: number of positions of the model, if it is limited.
        leaks: whether packed documents attend to each other; `None` if unknown.
        model_type: the model type in the configuration of the model.
        task: the task of the run: `sft`, `dpo`, `reward` or `kto`.
    """

    statistics: Stats
    template: str | None
    parameters: int
    positions: int | None
    leaks: bool | None
    model_type: str
    task: str = "sft"

    @property
    def all_rows(self) -> StatsGroup:
        """Statistics of all rows."""
        return self.statistics.groups[0]


def make_init_config(data: str, model: str, output_dir: str, overrides: Mapping[str, Any]) -> str:
    """Return a commented YAML configuration for the data and the model; see `ftdata.train.init`."""
    if data == "-":
        message = "data is '-' (standard input), which can be read only once, but training reads the data again"
        raise UsageError("init", message, hint="pass a file")
    fields = {name: value for name, value in overrides.items() if value is not None}
    config = make_config({"data": data, "model": model, "output_dir": output_dir, **fields})
    row_options = Options(**select_options(config.build_options(), "task", "rows"))
    rows_task = resolve_task(row_options, config.task, resolve_sources(data)).task
    template = config.template or _choose_template(data, config.tokenizer or model, config.limit, rows_task)
    statistics = stats(
        data, config.tokenizer or model, template, limit=config.limit, where=config.where, task=rows_task
    )
    _check_tasks(statistics, rows_task)
    model_config = load_model_config(model, trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        model_class = find_model_class("sft", model_config)
        shapes = model_class.from_config(model_config, trust_remote_code=config.trust_remote_code)
        parameters = shapes.num_parameters()
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    leaks = has_leaking_architecture(model_config, config.attn_implementation)
    task = config.task if config.task in TRAINER_TASKS else {"preference": "dpo"}.get(rows_task, rows_task)
    facts = DataFacts(statistics, template, parameters, positions, leaks, model_config.model_type, task)
    parts = {
        "data": ("Training data: a file, glob, folder, URL or Hub id, or a list of them.", data),
        **_task(facts),
        "template": (_template_comment(template), template),
        "mask": ("The tokens that carry loss.", {"train_on": "assistant", "turns": "auto"}),
        "length": _length(facts),
        "pack": _pack(facts),
        **_bad_rows(facts),
        "test_size": _test_size(facts),
        "model": (f"The base model: {parameters:,} parameters.", model),
        **_weights(facts),
        "train": (f"Fields of TRL's {TRAINER_TASKS[facts.task].config_class.__name__}.", _train(facts)),
        "output_dir": ("Folder for checkpoints, the model, the loss plot and samples.", output_dir),
    }
    for name in config.__struct_fields__:
        if name in fields and name not in ("data", "model", "output_dir"):
            parts[name] = ("Set on the command line.", fields[name])
    texts = [
        "".join(f"# {line}\n" for line in comment.splitlines()) + dump_yaml({name: value})
        for name, (comment, value) in parts.items()
    ]
    return "\n".join(texts)


def _check_tasks(statistics: Stats, task: str) -> None:
    """Check that no row is rejected because it belongs to another task.

    Raises:
        InputRefused: `mixed_tasks`.
    """
    count = sum(statistics.rejected.get(code, 0) for code in ("pair_in_sft", "not_a_pair", "no_label"))
    if count:
        rows = count_noun(count, "row")
        problem = f"the task of the data is {task}, but {rows} of {statistics.rows:,} have the form of another task"
        hint = "put conversations, pairs and labeled answers in separate files, or set the task"
        raise InputRefused("mixed_tasks", problem, hint=hint)


def _choose_template(data: str, tokenizer: str, limit: int | None, task: str) -> str | None:
    """Choose the built-in template that renders the most rows. Return `None` if the tokenizer has a chat template."""
    if load_tokenizer(tokenizer).chat_template:
        return None
    trial_rows, rejected = min(limit or _TRIAL_ROWS, _TRIAL_ROWS), {}
    for name in _TEMPLATES:
        try:
            rejected[name] = sum(stats(data, tokenizer, name, limit=trial_rows, task=task).rejected.values())
        except InputRefused:
            continue
    return min(rejected, key=lambda name: rejected[name], default=_TEMPLATES[-1])


def _template_comment(name: str | None) -> str:
    choices = "a built-in name (`ftdata templates list`), a .jinja file, or Jinja text."
    if name is None:
        return f"null: the tokenizer's chat template; or {choices}"
    return f"The tokenizer has no chat template; set {choices}"


def _task(facts: DataFacts) -> dict[str, tuple[str, str]]:
    comments = {
        "dpo": "The rows are preference pairs, which DPO trains on. reward: trains a reward model.",
        "reward": "The rows are preference pairs, which train a reward model. dpo: trains a model that answers.",
        "kto": "The rows are answers with labels.",
    }
    return {"task": (comments[facts.task], facts.task)} if facts.task in comments else {}


def _length(facts: DataFacts) -> tuple[str, dict[str, Any]]:
    lengths, positions = facts.all_rows.lengths, facts.positions or 1 << 20
    max_length = -(-lengths[100] // 64) * 64
    comment = f"Tokens per example: median {lengths[50]:,}, p99 {lengths[99]:,}, max {lengths[100]:,}."
    if max_length <= positions:
        return f"{comment} No example is truncated.", {"max_length": max_length, "overlong": "reject"}
    overlong = "drop_turns" if (facts.all_rows.turns or 0) > facts.all_rows.examples else "reject"
    effect = "turns are dropped from longer examples" if overlong == "drop_turns" else "longer examples are rejected"
    values = {"max_length": positions, "overlong": overlong}
    return f"{comment}\nThe model has {positions:,} positions: {effect}.", values


def _pack(facts: DataFacts) -> tuple[str, str | None]:
    if facts.task != "sft":
        return "null: rows with ratings are not packed.", None
    if facts.leaks:
        return f"null: packed documents of {facts.model_type} attend to each other, so rows are padded.", None
    if facts.leaks is None:
        return "bfd would pack complete examples; it is not known whether they would attend to each other.", None
    return "bfd: packs complete examples, which do not attend to each other. null: one example per row.", "bfd"


def _bad_rows(facts: DataFacts) -> dict[str, tuple[str, Any]]:
    rejected = sum(facts.statistics.rejected.values())
    if not rejected:
        comment = "error: bad rows stop the build. quarantine: bad rows are put aside, and the build continues."
        return {"on_bad_rows": (comment, "error")}
    codes = [f"{count:,} {code}" for code, count in facts.statistics.rejected.items()]
    comment = f"Rejected rows of {facts.statistics.rows:,}, which are listed in rejects.jsonl: {', '.join(codes)}."
    return {
        "on_bad_rows": (comment, "quarantine"),
        "max_rejects": (
            "The build stops if there are more rejected rows. Rows that are too long do not count.",
            rejected,
        ),
    }


def _test_size(facts: DataFacts) -> tuple[str, int | None]:
    if any(group.of == "split" and group.name not in ("train", "all") for group in facts.statistics.groups):
        return "The data already has a test split.", None
    if facts.all_rows.rows < 20:
        return "null: there are too few rows for a test split.", None
    size = min(facts.all_rows.rows // 10, 500)
    return "Number of random rows in the test split, for evaluation and for `ftdata eval`.", size


def _weights(facts: DataFacts) -> dict[str, tuple[str, Any]]:
    if facts.parameters <= _SMALL_MODEL:
        return {"lora": ("null: trains all weights; {r: 16, alpha: 32} would train an adapter.", None)}
    lora = ("A LoRA adapter on all linear layers.", {"r": 16, "alpha": 32, "dropout": 0.05})
    if not torch.cuda.is_available():
        return {"lora": lora, "quantization": ("null: 16 bits; nf4 (QLoRA) would need a quarter of the memory.", None)}
    fits = 2 * facts.parameters < 0.4 * device.free_memory()
    fits_comment = "null: the model fits in 16 bits; nf4 (QLoRA) would need a quarter of the memory."
    comment = fits_comment if fits else "The model in 4 bits (QLoRA)."
    return {"lora": lora, "quantization": (comment, None if fits else "nf4")}


def _train(facts: DataFacts) -> dict[str, Any]:
    length = _length(facts)[1]["max_length"]
    packed = _pack(facts)[1] is not None
    examples = max(1, facts.all_rows.examples // (len(SIDES) if facts.task in ("dpo", "reward") else 1))
    rows = max(1, facts.all_rows.tokens // length) if packed else examples
    row_length = length if packed else max(1, facts.all_rows.tokens // examples)
    rows_per_step = min(max(rows // _STEPS_PER_EPOCH, 1), _ROWS_PER_STEP)
    batch_size = min(max(_MAX_BATCH_TOKENS // row_length, 1), rows_per_step)
    if facts.task == "kto":
        # KTO compares the answers of a batch.
        batch_size = max(batch_size, 2)
    epochs = 1 if facts.all_rows.tokens > 20_000_000 else 3
    steps = max(1, epochs * rows // rows_per_step)
    return {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": -(-rows_per_step // batch_size),
        "learning_rate": _learning_rate(facts),
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, round(0.03 * steps)),
        "logging_steps": max(1, min(10, steps // 20)),
    }


def _learning_rate(facts: DataFacts) -> float:
    is_small, task = facts.parameters <= _SMALL_MODEL, TRAINER_TASKS[facts.task]
    if facts.task == "sft" and is_small:
        return _SMALL_MODEL_RATE
    return task.learning_rate if is_small else task.adapter_learning_rate
