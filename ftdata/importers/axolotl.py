"""Convert Axolotl YAML files to ftdata configurations.

The supported keys are the keys of axolotl 0.19.0 (`utils/schemas/config.py`, `datasets.py`).
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftdata.importers.axolotl_ratings import PREFERENCE_KEYS, convert_method, is_rated, read_rated_format
from ftdata.importers.draft import (
    CONVERT_HINT,
    KERNELS_NOTE,
    TEXT_TEMPLATE,
    Draft,
    KeyRules,
    apply_rules,
    check_roles,
    check_setting,
    conversion_error,
    explicit_settings,
    merge_dataset_options,
    note_unknown_keys,
    remove_evaluation,
    remove_packing,
    test_size_of,
)

_NO_EQUIVALENT = "it affects training, and ftdata has no equivalent"
_OTHER_METHOD = "ftdata does not support this training method"


def _check_plugins(names: Any) -> dict[str, Any]:
    """Leave out plug-ins that only replace kernels. Any other plug-in affects training."""
    listed = names if isinstance(names, list) else [names]
    unsupported = [str(name) for name in listed if not str(name).endswith(("LigerPlugin", "CutCrossEntropyPlugin"))]
    if unsupported:
        raise conversion_error(f"the plugin {unsupported[0]} cannot be converted: {_NO_EQUIVALENT}")
    return {}


KEYS = KeyRules(
    rules={
        "base_model": "model",
        "tokenizer_config": "tokenizer",
        "chat_template_kwargs": "template_kwargs",
        "sequence_len": "max_length",
        "sample_packing": lambda value: {"packing": "bfd"} if value else {},
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
        "flash_attention": lambda value: {"attn_implementation": "flash_attention_2"} if value else {},
        "sdp_attention": lambda value: {"attn_implementation": "sdpa"} if value else {},
        "eager_attention": lambda value: {"attn_implementation": "eager"} if value else {},
        "flex_attention": lambda value: {"attn_implementation": "flex_attention"} if value else {},
        "bf16": lambda value: {} if value == "auto" else {"train.bf16": bool(value)},
        "fp16": lambda value: {"train.fp16": bool(value)},
        "tf32": lambda value: {} if value == "auto" else {"train.tf32": bool(value)},
        "gradient_checkpointing": lambda value: {"train.gradient_checkpointing": bool(value)},
        "plugins": _check_plugins,
        "use_tensorboard": lambda value: {"train.report_to": "tensorboard"} if value else {},
        "use_wandb": lambda value: {"train.report_to": "wandb"} if value else {},
        "wandb_project": lambda name: {"train.report_to": "wandb"} if name else {},
        "wandb_name": "train.run_name",
    },
    same_name={
        "learning_rate", "max_steps", "gradient_accumulation_steps", "warmup_steps", "weight_decay", "max_grad_norm",
        "adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha", "logging_steps", "save_total_limit",
        "save_steps", "save_strategy", "eval_steps", "eval_strategy", "gradient_checkpointing_kwargs",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "torch_compile",
        "torch_compile_backend", "torch_compile_mode", "metric_for_best_model", "greater_is_better",
        "load_best_model_at_end", "auto_find_batch_size", "torch_empty_cache_steps",
    },
    ignored={
        "dataset_prepared_path", "dataset_num_proc", "dataset_processes", "dataset_keep_in_memory", "strict",
        "pad_to_sequence_len", "pad_to_multiple_of", "eval_sample_packing", "lora_mlp_kernel",
        "lora_qkv_kernel", "lora_o_kernel", "flash_attn_cross_entropy", "flash_attn_rms_norm", "tokenizer_use_fast",
        "model_type", "tokenizer_type", "is_llama_derived_model", "wandb_entity", "wandb_watch", "wandb_log_model",
        "wandb_run_id", "hub_model_id", "push_dataset_to_hub", "mlflow_tracking_uri", "comet_project_name", "debug",
        "cut_cross_entropy",
        "ddp_timeout", "ddp_bucket_cap_mb", "resume_from_checkpoint", "auto_resume_from_checkpoints", "local_rank",
    },
    notes={
        "group_by_length": "left out: unpacked rows of similar length are always batched together",
        "deepspeed": "left out: pass it to accelerate: accelerate launch --use_deepspeed ... -m ftdata train",
        "fsdp": "left out: pass it to accelerate: accelerate launch --use_fsdp ... -m ftdata train",
        "fsdp_config": "left out: pass it to accelerate: accelerate launch --use_fsdp ... -m ftdata train",
        "default_system_message": "left out: Axolotl 0.19 does not use it; add it to the data",
        "trust_remote_code": "left out: pass --trust-remote-code to run the code of a model",
        "eot_tokens": "left out: stop tokens are detected in the template",
        "special_tokens": "left out: stop tokens are detected; to add tokens, save a tokenizer that contains them",
        "tokens": "left out: save a tokenizer that contains them, and set tokenizer to its folder",
        "revision_of_model": "left out: download that revision, and set model to its folder",
        "shuffle_before_merging_datasets": "left out: use shuffle, which shuffles all rows once",
        "test_datasets": "left out: hold out rows with test_size, or with a test split in the data",
        **dict.fromkeys(
            ("liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_glu_activation", "liger_cross_entropy",
             "liger_fused_linear_cross_entropy", "liger_use_token_scaling"),
            KERNELS_NOTE,
        ),
        "cosine_min_lr_ratio": "left out: use lr_scheduler_type: cosine_with_min_lr",
    },
    unsupported={
        **dict.fromkeys(("process_reward_model", "pretraining_dataset"), _OTHER_METHOD),
        **dict.fromkeys(
            ("lora_model_dir", "relora", "unfrozen_parameters", "lisa_n_layers", "loraplus_lr_ratio", "embedding_lr",
             "lr_groups", "qat",
             "kd_trainer", "use_eaft", "curriculum_sampling", "min_sample_len", "trainer_cls", "gptq", "fp8"),
            _NO_EQUIVALENT,
        ),
    },
)  # fmt: skip
_MODEL_TEMPLATES = {
    "aya", "cohere", "command_a", "deepseek_v2", "deepseek_v3", "exaone", "falcon_h1", "gemma", "gemma3", "jamba",
    "llama3", "llama4", "mistral_v1", "mistral_v2v3", "mistral_v3_tekken", "mistral_v7_tekken", "phi_3", "phi_35",
    "phi_4", "qwen3", "qwen_25",
}  # fmt: skip
"""Templates of Axolotl that are named after a model, whose tokenizer contains the template."""

_DEFAULTS = {
    "sequence_len": 512, "num_epochs": 1, "micro_batch_size": 1, "seed": 42, "optimizer": "adamw_torch_fused",
    "lr_scheduler": "cosine", "save_total_limit": 4, "gradient_checkpointing": False, "output_dir": "model-out",
}  # fmt: skip
_CONVERTED_BELOW = (
    "reward_model", "datasets", "chat_template", "chat_template_jinja", "adapter", "load_in_4bit", "load_in_8bit",
    "excess_length_strategy", "rl", "train_on_inputs", "evals_per_epoch", "saves_per_epoch", "lora_target_linear",
)  # fmt: skip
_SOURCE_KEYS = {"path": "path", "name": "name", "revision": "revision", "split": "split", "data_files": "data_files"}
_MESSAGE_FIELDS = {
    "role": ("role", "from", "speaker", "author", "sender"),
    "content": ("content", "value", "text", "message"),
}
_SUFFIXES = ("json", "jsonl", "csv", "parquet", "arrow")
_IGNORED_KEYS = ("field_tools", "field_system", "field_thinking", "template_thinking_key", "weight")
_TYPE_KEYS = ("field_instruction", "field_input", "field_output", "format", "no_input_format", "system_prompt")
_UNSUPPORTED_KEYS = (
    "message_field_training_detail", "drop_system_message", "split_thinking", "shards", "shards_idx", "conversation",
)  # fmt: skip
_MASK_KEYS = ("message_field_training", "roles", "roles_to_train", "train_on_eos", "train_on_eot")
"""Keys of a data set that determine the mask."""

_KNOWN_KEYS = {
    *_SOURCE_KEYS, *_IGNORED_KEYS, *_TYPE_KEYS, *_UNSUPPORTED_KEYS, *_MASK_KEYS, "type", "ds_type", "field",
    "field_messages", "field_chosen", "field_rejected", "chat_template", "chat_template_jinja",
    "message_property_mappings", "message_field_role", "message_field_content", "preprocess_shards",
}  # fmt: skip


def draft_from_axolotl(values: Mapping[str, Any], selection: Sequence[str], folder: Path) -> Draft:  # noqa: ARG001  (all importers share this signature)
    """Convert the settings in an Axolotl file to a draft of an ftdata configuration.

    Args:
        values: the content of the file.
        selection: data sets to import, by path or number from 0. If empty, all are imported.
        folder: folder of the file. It is not used: paths in the file are relative to the working directory.

    Raises:
        UsageError: `cannot_import`.
    """
    if misplaced := [key for key in _MASK_KEYS if values.get(key)]:
        problem = f"Axolotl reads {', '.join(misplaced)} only in a data set"
        raise conversion_error(problem, hint="move these keys to the entries of datasets")
    draft, values = Draft(), explicit_settings(values, _DEFAULTS)
    if "warmup_steps" not in values:
        values.setdefault("warmup_ratio", 0.03)
    apply_rules(values, KEYS, draft, skip=(*_CONVERTED_BELOW, *(PREFERENCE_KEYS if is_rated(values) else ())))
    convert_method(values, draft)
    _convert_datasets(values, selection, draft)
    _convert_adapter(values, draft)
    _convert_overlong(values, draft)
    if values.get("wandb_project"):
        draft.add_note("wandb_project sets report_to only; set the project with the environment variable WANDB_PROJECT")
    for name in ("eval", "save"):
        if times := values.get(f"{name}s_per_epoch"):
            if times * values["num_epochs"] <= 0:
                raise ValueError(
                    f"{name}s_per_epoch is {times} and num_epochs is {values['num_epochs']}, expected positive numbers"
                )
            if times == 1:
                draft.set_field(f"train.{name}_strategy", "epoch")
            else:
                # Trainer accepts the interval as a share of all steps, but reads 1.0 as an interval of one step.
                draft.set_field(f"train.{name}_strategy", "steps")
                draft.set_field(f"train.{name}_steps", min(1 / (times * values["num_epochs"]), 0.999_999))
    if values.get("adapter") and values.get("lora_target_linear"):
        draft.set_field("lora.target_modules", "all-linear")
    remove_evaluation(draft)
    return draft


def _convert_adapter(values: Mapping[str, Any], draft: Draft) -> None:
    kind = values.get("adapter")
    check_setting("", "adapter", kind, (None, "lora", "qlora"))
    if kind is None:
        draft.fields.pop("lora", None)
    elif "lora" not in draft.fields:
        draft.fields["lora"] = {}
        draft.add_note(f"adapter {kind}: the file has no lora_r, so the default values of ftdata are used")
    if kind == "qlora":
        draft.set_field("quantization", "nf4")
    elif kind == "lora" and values.get("load_in_8bit"):
        draft.set_field("quantization", "int8")
    elif values.get("load_in_4bit"):
        draft.add_note(
            "load_in_4bit: left out: Axolotl uses it only with adapter: qlora, so the model is loaded in 16 bits"
        )
    if values.get("load_in_8bit") and kind != "lora":
        draft.add_note("load_in_8bit: left out: it is supported only with adapter: lora")


def _convert_overlong(values: Mapping[str, Any], draft: Draft) -> None:
    strategy = values.get("excess_length_strategy") or "drop"
    check_setting("", "excess_length_strategy", strategy, ("drop", "truncate", "raise"))
    if strategy == "truncate":
        draft.set_field("overlong", "truncate")
    else:
        draft.add_note(
            "rows that are too long are rejected and counted; invalid rows stop the build, "
            "unless you set on_bad_rows: quarantine and max_rejects"
        )


def _convert_datasets(values: Mapping[str, Any], selection: Sequence[str], draft: Draft) -> None:
    infos = values.get("datasets")
    if not (isinstance(infos, list) and infos and all(isinstance(info, Mapping) for info in infos)):
        raise conversion_error("datasets is invalid: expected a list of mappings, each with a path")
    if invalid := [info.get("path") for info in infos if not isinstance(info.get("path"), str) or not info["path"]]:
        raise conversion_error(f"datasets contains the path {invalid[0]!r:.80}, expected a file, a folder or a Hub id")
    numbered = {str(number): info for number, info in enumerate(infos)}
    paths = [info["path"] for info in infos]
    if unknown := [name for name in selection if name not in numbered and name not in paths]:
        problem = f"the file contains no data set {unknown[0]!r}, only {', '.join(paths)}"
        raise conversion_error(problem, hint="pass the path or the number of a data set; numbers start at 0")
    names = {*(selection or numbered)}
    selected = {number: info for number, info in numbered.items() if names & {number, info["path"]}}
    if len(selected) < len(numbered):
        remove_packing(draft)
    draft.set_field("data", [source for info in selected.values() for source in _make_sources(info, draft)])
    options = {f"{info['path']} ({number})": _row_options(info, values, draft) for number, info in selected.items()}
    merge_dataset_options(options, draft)


def _make_sources(info: Mapping[str, Any], draft: Draft) -> list[dict[str, Any]]:
    path, files = str(info["path"]), info.get("data_files")
    if without_effect := [key for key in _IGNORED_KEYS if info.get(key)]:
        explanation = "has no effect in Axolotl 0.19 and is left out; use columns to map columns"
        draft.add_note(f"{path}: {', '.join(without_effect)} {explanation}")
    if info.get("train_on_inputs"):
        problem = f"{path}: Axolotl does not read train_on_inputs in a data set"
        raise conversion_error(problem, hint="move this key out of datasets")
    if misplaced := [key for key in _TYPE_KEYS if info.get(key)]:
        problem = f"{path}: Axolotl does not read {', '.join(misplaced)} at this level"
        raise conversion_error(problem, hint="move these keys to a mapping under type")
    if unsupported := [key for key in _UNSUPPORTED_KEYS if info.get(key)]:
        raise conversion_error(
            f"{path}: ftdata has no equivalent for these keys, which affect training: {', '.join(unsupported)}"
        )
    note_unknown_keys(path, info, _KNOWN_KEYS, draft)
    kind, split = info.get("ds_type"), info.get("split")
    check_setting(path, "ds_type", kind, (None, *_SUFFIXES, "text"))
    options = {"split": split} if split not in (None, "train") else {}
    if files and Path(path).is_dir():
        # Axolotl resolves these paths relative to the working directory.
        return [{"path": file, **options} for file in ([files] if isinstance(files, str) else files)]
    if files and path in _SUFFIXES:
        # The name of a format with files, as in `datasets.load_dataset`.
        return [{"path": file, **options} for file in ([files] if isinstance(files, str) else files)]
    if Path(path).suffix[1:] in _SUFFIXES or Path(path).is_file():
        # A file has only a train split.
        needs_format = kind in _SUFFIXES and Path(path).suffix[1:] not in (kind, "jsonl")
        return [{"path": path, **options, **({"format": kind} if needs_format else {})}]
    return [{"split": "train", **{field: info[key] for key, field in _SOURCE_KEYS.items() if info.get(key)}}]


def _row_options(info: Mapping[str, Any], values: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    """Convert the settings of an Axolotl data set to ftdata options: schema, columns, template and `train_on`."""
    kind, path = info.get("type"), str(info["path"])
    if is_rated(values):
        renamed, template = read_rated_format(info, values)
        return {**({"columns": renamed} if renamed else {}), **_template_options(template, values, draft)}
    train_on = {"train_on": "all"} if values.get("train_on_inputs") else {}
    if isinstance(kind, Mapping):
        return {**_prompt_template_options(kind), **train_on}
    if kind is None:
        return {"schema": "tokens"}
    if kind == "alpaca":
        draft.add_note(
            "type alpaca: the text is the same, but Axolotl tokenizes prompt and answer separately; "
            "ftdata tokenizes them together, as at inference"
        )
        return {"schema": "alpaca", "template": "alpaca", **train_on}
    if kind == "completion":
        draft.add_note("type completion: each text is one example; Axolotl splits long texts into several examples")
        column = info.get("field") or "text"
        columns = {} if column == "text" else {"columns": {"text": column}}
        return {"schema": "text", "template": TEXT_TEMPLATE, **columns}
    if kind == "chat_template":
        if train_on:
            draft.add_note("train_on_inputs: the whole text is trained; Axolotl excludes the headers of chat templates")
        return {**_chat_options(info, values, draft), **train_on}
    hint = (
        "use type: chat_template, and set chat_template to the value of conversation"
        if str(kind).startswith("sharegpt")
        else "write the format as a Jinja template, and set template to that file"
    )
    raise conversion_error(f"{path}: ftdata has no equivalent for the data set type {kind}", hint=hint)


def _chat_options(info: Mapping[str, Any], values: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    path = str(info["path"])
    field_keys = {"role": info.get("message_field_role"), "content": info.get("message_field_content")}
    field_keys |= info.get("message_property_mappings") or {}
    for field, key in field_keys.items():
        if key and key not in _MESSAGE_FIELDS.get(field, (field,)):
            problem = f"{path}: the {field} of each message is under the key {key!r}, which ftdata does not support"
            raise conversion_error(problem, hint=CONVERT_HINT)
    roles = info.get("roles") or {}
    check_roles(
        {role: meaning for meaning, names in roles.items() for role in ([names] if isinstance(names, str) else names)},
        path,
    )
    trained_roles = info.get("roles_to_train", ["assistant"])
    if not trained_roles or not set(trained_roles) <= {"assistant", "gpt"}:
        problem = f"{path}: roles_to_train is {trained_roles}, expected assistant"
        hint = (
            "remove roles_to_train, import the file, and set train_on: ./mine.py:select in the result, with a function "
            "that selects the trained messages"
        )
        raise conversion_error(problem, hint=hint)
    if info.get("train_on_eos", "turn") not in (None, "turn") or info.get("train_on_eot", "turn") not in (None, "turn"):
        draft.add_note(f"{path}: the stop token of every trained turn is trained, regardless of train_on_eos")
    training_key = info.get("message_field_training")
    trained_names = (None, "", "train", "training", "weight", "loss")
    hint = "rename this message field to train in the data"
    check_setting(path, "message_field_training", training_key, trained_names, hint)
    if not training_key:
        draft.add_note(
            f"{path}: messages with train, training, weight or loss of 0 are not trained; "
            "Axolotl trains them unless message_field_training is set"
        )
    else:
        draft.add_note(
            f"{path}: only messages of the assistant are trained; Axolotl also trains messages of other roles if "
            f"{training_key} is true"
        )
    column = info.get("field_messages") or "messages"
    columns = {} if column in ("messages", "conversations") else {"columns": {"messages": column}}
    return {**columns, **_template_options(info, values, draft)}


def _template_options(info: Mapping[str, Any], values: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    for settings in (info, values):
        name, text = settings.get("chat_template"), settings.get("chat_template_jinja")
        if text and name in (None, "jinja"):
            return {"template": text}
        if name is None or str(name).startswith("tokenizer_default"):
            continue
        if name == "chatml":
            draft.add_note(
                "chat_template chatml: the text is the same; the stop token <|im_end|> must be in the tokenizer"
            )
            return {"template": "chatml"}
        if name in _MODEL_TEMPLATES:
            draft.add_note(
                f"chat_template {name}: ftdata uses the chat template of the model, which can differ from Axolotl's; "
                "check the text with ftdata preview, or set template to a .jinja file"
            )
            continue
        problem = f"the chat_template {name} cannot be converted"
        hint = "save the template as a .jinja file and set template to its path, or use tokenizer_default"
        raise conversion_error(problem, hint=hint)
    return {}


def _prompt_template_options(kind: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a custom prompt format, a mapping under the key `type`, to the options schema, columns and template.

    >>> kind = {"field_instruction": "q", "field_output": "a", "format": "Q: {instruction} A: "}
    >>> _prompt_template_options(kind)["columns"]
    {'instruction': 'q', 'output': 'a'}
    """
    fields = {name: f"field_{name}" for name in ("instruction", "input", "output", "system")}
    known_keys = {*fields.values(), "system_prompt", "system_format", "format", "no_input_format"}
    if unknown := kind.keys() - known_keys:
        raise conversion_error(f"the mapping under type contains unknown keys: {', '.join(sorted(unknown))}")
    columns = {name: kind[key] for name, key in fields.items() if kind.get(key, name) != name}
    system, system_format = kind.get("system_prompt") or "", kind.get("system_format") or "{system}"
    with_input = kind.get("format") or "{instruction} {input} "
    without_input = kind.get("no_input_format") or "{instruction} "
    template = (
        f"{{%- set system = system if system is defined else {json.dumps(system, ensure_ascii=False)} -%}}\n"
        f"{{%- if system %}}{_to_jinja(system_format)}{{% endif -%}}\n"
        f"{{%- if input is defined and input %}}{_to_jinja(with_input)}"
        f"{{% else %}}{_to_jinja(without_input)}{{% endif -%}}\n"
        "{% generation %}{{ output }}{{ eos_token }}{% endgeneration -%}\n"
    )
    return {"schema": "alpaca", "template": template, **({"columns": columns} if columns else {})}


def _to_jinja(text: str) -> str:
    r"""Convert a Python format string to a Jinja template.

    Raises:
        UsageError: `cannot_import`: a field is not a plain name.

    >>> print(_to_jinja("Q: {instruction}\n{{x}}"))
    {{ "Q: " }}{{ instruction }}{{ "\n{x}" }}
    """
    parts, literal = list[str](), ""
    for prefix, name, format_spec, conversion in string.Formatter().parse(text):
        literal += prefix
        if name is None:
            continue
        if name not in ("instruction", "input", "system") or format_spec or conversion:
            problem = f"the format {text!r:.80} contains the unsupported field {name!r}"
            raise conversion_error(problem, hint="use {instruction}, {input} or {system}")
        parts, literal = [*parts, _to_jinja_literal(literal), f"{{{{ {name} }}}}"], ""
    return "".join([*parts, _to_jinja_literal(literal)])


def _to_jinja_literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
