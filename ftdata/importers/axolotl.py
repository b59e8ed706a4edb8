"""Axolotl's YAML. What each key means is as in axolotl 0.19.0 (`utils/schemas/config.py`, `datasets.py`)."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftdata.importers.draft import (
    Draft,
    KeyRules,
    apply_rules,
    check_roles,
    conversion_error,
    explicit_settings,
    merge_dataset_options,
    note_unknown_keys,
    remove_evaluation,
    test_size_of,
)

_CHANGES = "it changes what is learnt, and ftdata has nothing like it"
_ANOTHER = "that is another way of training"
KEYS = KeyRules(
    rules={
        "base_model": "model",
        "tokenizer_config": "tokenizer",
        "chat_template_kwargs": "template_kwargs",
        "sequence_len": "max_length",
        "sample_packing": lambda yes: {"packing": "bfd"} if yes else {},
        "val_set_size": test_size_of,
        "dataset_exact_deduplication": "dedup",
        "shuffle_merged_datasets": "shuffle",
        "output_dir": "output_dir",
        "seed": lambda seed: {"seed": seed, "train.seed": seed},
        "lora_r": "lora.r",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "lora_target_modules": "lora.target_modules",
        "lora_modules_to_save": "lora.modules_to_save",
        "peft_use_dora": "lora.use_dora",
        "peft_use_rslora": "lora.use_rslora",
        "num_epochs": "train.num_train_epochs",
        "micro_batch_size": "train.per_device_train_batch_size",
        "eval_batch_size": "train.per_device_eval_batch_size",
        "optimizer": "train.optim",
        "optim_args": "train.optim_args",
        "lr_scheduler": "train.lr_scheduler_type",
        "lr_scheduler_kwargs": "train.lr_scheduler_kwargs",
        "warmup_ratio": "train.warmup_steps",
        "early_stopping_patience": "early_stopping",
        "attn_implementation": "attn_implementation",
        "flash_attention": lambda yes: {"attn_implementation": "flash_attention_2"} if yes else {},
        "sdp_attention": lambda yes: {"attn_implementation": "sdpa"} if yes else {},
        "eager_attention": lambda yes: {"attn_implementation": "eager"} if yes else {},
        "flex_attention": lambda yes: {"attn_implementation": "flex_attention"} if yes else {},
        "bf16": lambda yes: {} if yes == "auto" else {"train.bf16": bool(yes)},
        "fp16": lambda yes: {"train.fp16": bool(yes)},
        "tf32": lambda yes: {} if yes == "auto" else {"train.tf32": bool(yes)},
        "gradient_checkpointing": lambda yes: {"train.gradient_checkpointing": bool(yes)},
        "use_tensorboard": lambda yes: {"train.report_to": "tensorboard"} if yes else {},
        "use_wandb": lambda yes: {"train.report_to": "wandb"} if yes else {},
        "wandb_project": lambda name: {"train.report_to": "wandb"} if name else {},
        "wandb_name": "train.run_name",
    },
    same={
        "learning_rate", "max_steps", "gradient_accumulation_steps", "warmup_steps", "weight_decay", "max_grad_norm",
        "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha", "logging_steps", "save_total_limit",
        "save_steps", "save_strategy", "eval_steps", "eval_strategy", "gradient_checkpointing_kwargs",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "torch_compile",
        "torch_compile_backend", "torch_compile_mode", "metric_for_best_model", "greater_is_better",
        "load_best_model_at_end", "auto_find_batch_size", "torch_empty_cache_steps",
    },
    left={
        "dataset_prepared_path", "dataset_num_proc", "dataset_processes", "dataset_keep_in_memory", "strict",
        "pad_to_sequence_len", "pad_to_multiple_of", "group_by_length", "eval_sample_packing", "lora_mlp_kernel",
        "lora_qkv_kernel", "lora_o_kernel", "flash_attn_cross_entropy", "flash_attn_rms_norm", "tokenizer_use_fast",
        "model_type", "tokenizer_type", "is_llama_derived_model", "wandb_entity", "wandb_watch", "wandb_log_model",
        "wandb_run_id", "hub_model_id", "push_dataset_to_hub", "mlflow_tracking_uri", "comet_project_name", "debug",
        "ddp_timeout", "ddp_bucket_cap_mb", "resume_from_checkpoint", "auto_resume_from_checkpoints", "local_rank",
    },
    noted={
        "deepspeed": "is said to accelerate: accelerate launch --use_deepspeed ... -m ftdata train",
        "fsdp": "is said to accelerate: accelerate launch --use_fsdp ... -m ftdata train",
        "fsdp_config": "is said to accelerate: accelerate launch --use_fsdp ... -m ftdata train",
        "default_system_message": "Axolotl 0.19 puts it nowhere, so it is left out; write it into the data",
        "trust_remote_code": "left out: code of a model runs where you say so, --trust-remote-code",
        "eot_tokens": "left out: stops are found in the template",
        "special_tokens": "left out: stops are found; for more tokens, save a tokenizer with them",
        "tokens": "left out: save a tokenizer with them, and name it as tokenizer",
        "revision_of_model": "left out: download that revision, and name its folder as model",
        "shuffle_before_merging_datasets": "left out: rows are put into another order once, with shuffle",
        "test_datasets": "left out: held-out rows are those of test_size, or a split named test of the same data",
        "cosine_min_lr_ratio": "left out: see cosine_with_min_lr of lr_scheduler_type",
    },
    refused={
        **dict.fromkeys(("rl", "reward_model", "process_reward_model", "pretraining_dataset"), _ANOTHER),
        **dict.fromkeys(
            ("lora_model_dir", "relora", "unfrozen_parameters", "lisa_n_layers", "loraplus_lr_ratio", "embedding_lr",
             "lr_groups", "qat", "plugins",
             "kd_trainer", "use_eaft", "curriculum_sampling", "min_sample_len", "trainer_cls", "gptq", "fp8"),
            _CHANGES,
        ),
    },
)  # fmt: skip
_USUAL = {
    "sequence_len": 512, "num_epochs": 1, "micro_batch_size": 1, "seed": 42, "optimizer": "adamw_torch_fused",
    "lr_scheduler": "cosine", "save_total_limit": 4, "gradient_checkpointing": False, "output_dir": "model-out",
}  # fmt: skip
_OWN = ("datasets", "chat_template", "chat_template_jinja", "adapter", "load_in_4bit", "load_in_8bit",
        "excess_length_strategy", "train_on_inputs", "evals_per_epoch", "saves_per_epoch",
        "lora_target_linear")  # fmt: skip
_SOURCE = {"path": "path", "name": "name", "revision": "revision", "split": "split", "data_files": "data_files"}
_MESSAGES = {
    "role": ("role", "from", "speaker", "author", "sender"),
    "content": ("content", "value", "text", "message"),
}
_SUFFIXES = ("json", "jsonl", "csv", "parquet", "arrow")
_IGNORED = ("field_tools", "field_system", "field_thinking", "template_thinking_key", "weight")
_OF_TYPE = ("field_instruction", "field_input", "field_output", "format", "no_input_format", "system_prompt")
_NOWHERE = (
    "message_field_training_detail", "drop_system_message", "split_thinking", "shards", "shards_idx", "conversation",
)  # fmt: skip


_KNOWN = {
    *_SOURCE, *_IGNORED, *_OF_TYPE, *_NOWHERE, "type", "ds_type", "field", "field_messages", "chat_template",
    "message_property_mappings", "message_field_role", "message_field_content", "roles", "roles_to_train",
    "train_on_eos", "train_on_eot", "message_field_training", "chat_template_jinja", "preprocess_shards",
}  # fmt: skip


def draft_from_axolotl(values: Mapping[str, Any], chosen: Sequence[str], folder: Path) -> Draft:  # noqa: ARG001  (one signature for all)
    """Return a draft of what an Axolotl file says.

    Args:
        values: the file.
        chosen: which of its data sets, by path or number from 0; none: all.
        folder: where the file lies; paths in it are relative to where the command is run.

    Raises:
        UsageError: `cannot_import`.
    """
    draft, values = Draft(), explicit_settings(values, _USUAL)
    if "warmup_steps" not in values:
        values.setdefault("warmup_ratio", 0.03)
    apply_rules(values, KEYS, draft, but=_OWN)
    _data(values, chosen, draft)
    _adapter(values, draft)
    _too_long(values, draft)
    for name in ("eval", "save"):
        if times := values.get(f"{name}s_per_epoch"):
            if times * values["num_epochs"] <= 0:
                raise ValueError(f"{name}s_per_epoch is {times}, num_epochs {values['num_epochs']}")
            # A share of the whole run, as Trainer takes it.
            draft.put(f"train.{name}_strategy", "steps")
            draft.put(f"train.{name}_steps", 1 / (times * values["num_epochs"]))
    if values.get("adapter") and values.get("lora_target_linear"):
        draft.put("lora.target_modules", "all-linear")
    remove_evaluation(draft)
    return draft


def _adapter(values: Mapping[str, Any], draft: Draft) -> None:
    kind = values.get("adapter")
    if kind not in (None, "lora", "qlora"):
        raise conversion_error(f"adapter: {kind}, of which ftdata knows lora and qlora")
    if kind is None:
        draft.fields.pop("lora", None)
    if kind == "qlora":
        draft.put("quantization", "nf4")
    elif kind == "lora" and values.get("load_in_8bit"):
        draft.put("quantization", "int8")
    elif values.get("load_in_4bit"):
        draft.note("load_in_4bit: Axolotl loads 4 bits with adapter: qlora only, so this is 16 bits here as there")
    if values.get("load_in_8bit") and kind != "lora":
        draft.note("load_in_8bit: left out: it is taken over with adapter: lora only")


def _too_long(values: Mapping[str, Any], draft: Draft) -> None:
    how = values.get("excess_length_strategy") or "drop"
    if how == "truncate":
        draft.put("overlong", "truncate")
    elif how == "drop":
        draft.put("on_bad_rows", "quarantine")
        draft.put("max_rejects", "100%")
        draft.note("rows that are too long are left out and counted; so are bad ones: max_rejects says how many may be")
    elif how != "raise":
        raise conversion_error(f"excess_length_strategy: {how}")


def _data(values: Mapping[str, Any], chosen: Sequence[str], draft: Draft) -> None:
    every = values.get("datasets")
    if not (isinstance(every, list) and every and all(isinstance(one, Mapping) for one in every)):
        raise conversion_error("datasets: expected a list of mappings, each with a path")
    if odd := [one.get("path") for one in every if not isinstance(one.get("path"), str) or not one["path"]]:
        raise conversion_error(f"datasets: a path is {odd[0]!r:.80}, expected a file, a folder, or a name of the hub")
    named = {str(number): one for number, one in enumerate(every)}
    if unknown := [name for name in chosen if name not in named and name not in [one["path"] for one in every]]:
        raise conversion_error(
            f"no data set {unknown[0]!r}; there are {', '.join(one['path'] for one in every)}",
            hint="a path, or a number from 0",
        )
    taken = {number: one for number, one in named.items() if not chosen or number in chosen or one["path"] in chosen}
    draft.put("data", [source for one in taken.values() for source in _sources(one, draft)])
    kinds = {f"{one['path']} ({number})": _kind(one, values, draft) for number, one in taken.items()}
    merge_dataset_options(kinds, draft)


def _sources(one: Mapping[str, Any], draft: Draft) -> list[dict[str, Any]]:
    path, files = str(one["path"]), one.get("data_files")
    if useless := [key for key in _IGNORED if one.get(key)]:
        told = "had no effect in Axolotl 0.19 and is left out; columns names such columns"
        draft.note(f"{path}: {', '.join(useless)} {told}")
    if misplaced := [key for key in _OF_TYPE if one.get(key)]:
        told = "stands beside type, where Axolotl does not read it; it belongs into a mapping under type"
        raise conversion_error(f"{path}: {', '.join(misplaced)} {told}")
    if lost := [key for key in _NOWHERE if one.get(key)]:
        raise conversion_error(f"{path}: {', '.join(lost)}: {_CHANGES}")
    note_unknown_keys(path, one, _KNOWN, draft)
    kind, split = one.get("ds_type"), one.get("split")
    if kind not in (None, *_SUFFIXES, "text"):
        raise conversion_error(f"{path}: ds_type is {kind!r:.60}", hint=f"one of {', '.join(_SUFFIXES)}")
    said = {"split": split} if split not in (None, "train") else {}
    if files and Path(path).is_dir():
        # Axolotl takes these relative to where it runs.
        return [{"path": place, **said} for place in ([files] if isinstance(files, str) else files)]
    if Path(path).suffix[1:] in _SUFFIXES or Path(path).is_file():
        # Of a file there is a train split alone.
        other = kind in _SUFFIXES and Path(path).suffix[1:] not in (kind, "jsonl")
        return [{"path": path, **said, **({"format": kind} if other else {})}]
    return [{"split": "train", **{ours: one[theirs] for theirs, ours in _SOURCE.items() if one.get(theirs)}}]


def _kind(one: Mapping[str, Any], values: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    """Return what a data set says of its rows: schema, columns, template, and what of them is trained."""
    kind, path = one.get("type"), str(one["path"])
    everything = {"train_on": "all"} if values.get("train_on_inputs") else {}
    if isinstance(kind, Mapping):
        return {**_mapped(kind), **everything}
    if kind is None:
        return {"schema": "tokens"}
    if kind == "alpaca":
        draft.note(
            "type alpaca: the same text; Axolotl tokenises prompt and answer apart, ftdata the whole, as at inference"
        )
        return {"schema": "alpaca", "template": "alpaca", **everything}
    if kind == "completion":
        draft.note("type completion: a text is one example; Axolotl cuts longer ones into several")
        column = one.get("field") or "text"
        columns = {} if column == "text" else {"columns": {"text": column}}
        return {"schema": "text", "template": "{% generation %}{{ text }}{{ eos_token }}{% endgeneration %}", **columns}
    if kind == "chat_template":
        if everything:
            draft.note("train_on_inputs: everything is trained here; Axolotl leaves out headers of chat templates")
        return {**_chat(one, values, draft), **everything}
    way = (
        "use type: chat_template"
        if str(kind).startswith("sharegpt")
        else "write it as a Jinja template: template in ours"
    )
    raise conversion_error(f"{path}: type {kind} has no counterpart", hint=way)


def _chat(one: Mapping[str, Any], values: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    path = str(one["path"])
    mapped = {"role": one.get("message_field_role"), "content": one.get("message_field_content")}
    mapped |= one.get("message_property_mappings") or {}
    for name, theirs in mapped.items():
        if theirs and theirs not in _MESSAGES.get(name, (name,)):
            raise conversion_error(
                f"{path}: messages have their {name} under {theirs!r}",
                hint="make messages of rows by a function: schema='./mine.py:convert'",
            )
    roles = one.get("roles") or {}
    check_roles(
        {found: meant for meant, names in roles.items() for found in ([names] if isinstance(names, str) else names)},
        path,
    )
    trained = one.get("roles_to_train", ["assistant"])
    if not trained or not set(trained) <= {"assistant", "gpt"}:
        raise conversion_error(f"{path}: roles_to_train {trained}", hint="train_on takes a function, from Python")
    if one.get("train_on_eos", "turn") not in (None, "turn") or one.get("train_on_eot", "turn") not in (None, "turn"):
        draft.note(f"{path}: the stop of every trained turn is trained, whatever train_on_eos says")
    flag = one.get("message_field_training")
    if flag and flag not in ("train", "training", "weight", "loss"):
        raise conversion_error(
            f"{path}: messages say whether they are trained under {flag!r}", hint="rename it to train"
        )
    if not flag:
        draft.note(
            f"{path}: messages with train, training, weight or loss of 0 are left untrained; there only when told so"
        )
    column = one.get("field_messages") or "messages"
    columns = {} if column in ("messages", "conversations") else {"columns": {"messages": column}}
    return {**columns, **_template(one, values, draft)}


def _template(one: Mapping[str, Any], values: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    for said in (one, values):
        name, text = said.get("chat_template"), said.get("chat_template_jinja")
        if text and name in (None, "jinja"):
            return {"template": text}
        if name in (None, "tokenizer_default"):
            continue
        if name == "chatml":
            draft.note("chat_template chatml: the same text; its stop, <|im_end|>, must be a token of the tokenizer")
            return {"template": "chatml"}
        if str(name).startswith("tokenizer_default_fallback"):
            continue
        raise conversion_error(
            f"chat_template: {name}",
            hint="save that template as a file, and name it; or take the model's own: tokenizer_default",
        )
    return {}


def _mapped(kind: Mapping[str, Any]) -> dict[str, Any]:
    """Return the prompt template that a mapping under `type` stands for.

    >>> _mapped({"field_instruction": "q", "field_output": "a", "format": "Q: {instruction} A: "})["columns"]
    {'instruction': 'q', 'output': 'a'}
    """
    known = {
        "system_prompt",
        "system_format",
        "field_system",
        "field_instruction",
        "field_input",
        "field_output",
        "format",
        "no_input_format",
    }
    if unknown := kind.keys() - known:
        raise conversion_error(f"type: {', '.join(sorted(unknown))} is not known")
    columns = {
        name: kind[f"field_{name}"]
        for name in ("instruction", "input", "output", "system")
        if kind.get(f"field_{name}", name) != name
    }
    system, said = kind.get("system_prompt") or "", kind.get("system_format") or "{system}"
    both, alone = kind.get("format") or "{instruction} {input} ", kind.get("no_input_format") or "{instruction} "
    template = (
        f"{{%- set system = system if system is defined else {json.dumps(system, ensure_ascii=False)} -%}}\n"
        f"{{%- if system %}}{_jinja(said)}{{% endif -%}}\n"
        f"{{%- if input is defined and input %}}{_jinja(both)}{{% else %}}{_jinja(alone)}{{% endif -%}}\n"
        "{% generation %}{{ output }}{{ eos_token }}{% endgeneration -%}\n"
    )
    return {"schema": "alpaca", "template": template, **({"columns": columns} if columns else {})}


def _jinja(text: str) -> str:
    r"""Return a format of Python's as Jinja, its text as it stands.

    Raises:
        UsageError: `cannot_import`: a field of it is no plain name.

    >>> print(_jinja("Q: {instruction}\n{{x}}"))
    {{ "Q: " }}{{ instruction }}{{ "\n{x}" }}
    """
    parts, plain = list[str](), ""
    for words, name, form, conversion in string.Formatter().parse(text):
        plain += words
        if name is None:
            continue
        if name not in ("instruction", "input", "system") or form or conversion:
            raise conversion_error(
                f"the format {text!r:.80} has the field {name!r}", hint="instruction, input or system, plain"
            )
        parts, plain = [*parts, _printed(plain), f"{{{{ {name} }}}}"], ""
    return "".join([*parts, _printed(plain)])


def _printed(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
