"""Convert LLaMA-Factory training files and `dataset_info.json` files to ftdata configurations.

The supported keys are the keys of llamafactory 0.9.5 (`data/parser.py`, `hparams/`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftdata.errors import describe_exception, suggest_names
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
from ftdata.schemas.labels import LABEL_COLUMNS

_INFO_FILE = "dataset_info.json"
_NO_EQUIVALENT = "it affects training, and ftdata has no equivalent"
_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}


def _parse_layers(names: str) -> str | list[str]:
    return "all-linear" if names == "all" else names.replace(" ", "").split(",")


KEYS = KeyRules(
    rules={
        "model_name_or_path": "model",
        "output_dir": "output_dir",
        "cutoff_len": "max_length",
        "train_on_prompt": lambda value: {"train_on": "all"} if value else {},
        "mask_history": lambda value: {"train_on": "last_assistant"} if value else {},
        "packing": lambda value: {"packing": "bfd"} if value else {},
        "neat_packing": lambda value: {"packing": "bfd"} if value else {},
        "max_samples": "limit",
        "val_size": test_size_of,
        "seed": lambda seed: {"seed": seed, "train.seed": seed},
        "lora_rank": "lora.r",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "lora_target": lambda names: {"lora.target_modules": _parse_layers(names)},
        "use_dora": "lora.use_dora",
        "use_rslora": "lora.use_rslora",
        "additional_target": lambda names: {"lora.modules_to_save": names.replace(" ", "").split(",")},
        "warmup_ratio": "train.warmup_steps",
        "early_stopping_steps": "early_stopping",
        "flash_attn": lambda name: {"attn_implementation": _ATTENTION[name]} if name in _ATTENTION else {},
        "disable_gradient_checkpointing": lambda value: {"train.gradient_checkpointing": not value},
        "enable_thinking": lambda value: {"template_kwargs": {"enable_thinking": value}},
        "use_dft_loss": lambda value: {"train.loss_type": "dft"} if value else {},
    },
    same_name={
        "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
        "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "tf32", "logging_steps",
        "save_steps", "save_strategy", "save_total_limit", "eval_strategy", "eval_steps", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better", "neftune_noise_alpha", "report_to", "run_name", "torch_compile",
        "dataloader_num_workers", "dataloader_pin_memory",
    },
    ignored={
        "do_train", "do_eval", "do_predict", "predict_with_generate", "preprocessing_num_workers", "use_fast_tokenizer",
        "preprocessing_batch_size", "overwrite_cache", "overwrite_output_dir", "plot_loss", "streaming", "buffer_size",
        "data_shared_file_system", "ddp_timeout", "use_unsloth", "upcast_layernorm",
        "upcast_lmhead_output", "resume_from_checkpoint", "include_num_input_tokens_seen", "use_reentrant_gc",
        "cache_dir", "low_cpu_mem_usage", "save_only_model", "ray_run_name", "double_quantization",
        "quantization_method", "quantization_type",
    },
    notes={
        "group_by_length": "left out: unpacked rows of similar length are always batched together",
        "deepspeed": "left out: pass it to accelerate: accelerate launch --use_deepspeed ... -m ftdata train",
        "fsdp": "left out: pass it to accelerate: accelerate launch --use_fsdp ... -m ftdata train",
        "trust_remote_code": "left out: pass --trust-remote-code to run the code of a model",
        "pure_bf16": "left out: ftdata trains an adapter, or float32 weights",
        "model_revision": "left out: download that revision, and set model to its folder",
        "tool_format": "left out: the chat template determines the format of tool calls",
        "resize_vocab": "left out: embeddings are added automatically if the tokenizer has more tokens than the model",
        "add_tokens": "left out: save a tokenizer that contains them, and set tokenizer to its folder",
        "add_special_tokens": "left out: save a tokenizer that contains them, and set tokenizer to its folder",
        "eval_dataset": "left out: hold out rows with test_size, or with a test split in the data",
        "enable_liger_kernel": KERNELS_NOTE,
        "disable_shuffling": "left out: the seed and the epoch determine the order of the rows",
    },
    unsupported={
        **dict.fromkeys(
            ("pissa_init", "loraplus_lr_ratio", "use_galore",
             "use_apollo", "use_badam", "use_adam_mini", "use_muon", "use_llama_pro", "use_asft_loss", "use_eaft_loss",
             "mixture_of_depths", "rope_scaling", "shift_attn", "interleave_probs", "freeze_trainable_layers",
             "adapter_name_or_path"),
            _NO_EQUIVALENT,
        ),
        "default_system": "it changes the text of the rows; add the system message to the data or to a template",
        "tokenized_path": "LLaMA-Factory ignores all other data settings with it; import the original data instead",
    },
)  # fmt: skip
_DEFAULTS = {
    "lora_rank": 8, "lora_target": "all",
    "cutoff_len": 2048, "learning_rate": 5e-5, "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "seed": 42,
}  # fmt: skip
_CONVERTED_BELOW = (
    "stage", "dataset", "dataset_dir", "template", "finetuning_type", "quantization_bit", "mix_strategy",
)  # fmt: skip
_STAGES = {"sft": "sft", "pt": "sft", "dpo": "preference", "rm": "reward", "kto": "kto"}
"""Stage that can be imported -> task of ftdata."""

_PREFERENCE_KEYS = {
    "dpo": ("pref_beta", "pref_loss", "pref_ftx", "dpo_label_smoothing", "ref_model", "ref_model_adapters"),
    "kto": ("pref_beta", "kto_chosen_weight", "kto_rejected_weight", "ref_model", "ref_model_adapters"),
}
"""Stage -> keys that are converted only for this stage."""

_MIX_HINT = "remove mix_strategy and interleave_probs, and set weight for each data set in ftdata's configuration"
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_OPTIONAL_COLUMNS = {"query": "input", "system": "system", "history": "history"}
_KNOWN_KEYS = {
    "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name", "formatting", "ranking",
    "subset", "split", "folder", "num_samples", "columns", "tags",
}  # fmt: skip
_UNSUPPORTED_COLUMNS = ("videos", "audios", "kto_tag")
_ROLE_TAGS = {
    "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "observation",
}  # fmt: skip


def draft_from_training_file(values: Mapping[str, Any], selection: Sequence[str], folder: Path) -> Draft:
    """Convert a LLaMA-Factory training file and its data sets to a draft of an ftdata configuration.

    Args:
        values: the content of the file.
        selection: names of the data sets to import. If empty, all are imported.
        folder: folder of the file. `dataset_dir` may be relative to the working directory or to this folder.

    Raises:
        UsageError: `cannot_import`.
    """
    stage = values.get("stage", "sft")
    check_setting("", "stage", stage, _STAGES)
    check_setting("", "mix_strategy", values.get("mix_strategy", "concat"), ("concat",), _MIX_HINT)
    draft, values = Draft(), explicit_settings(values, _DEFAULTS)
    values.setdefault("lora_alpha", 2 * values["lora_rank"])
    apply_rules(values, KEYS, draft, skip=(*_CONVERTED_BELOW, *_PREFERENCE_KEYS.get(stage, ())))
    _convert_weights(values, draft)
    _convert_lengths(values, draft)
    listed = values.get("dataset") or ""
    texts = map(str, listed if isinstance(listed, list) else [listed])
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    if not names:
        raise conversion_error("the setting dataset is empty, expected the names of data sets")
    data_dir = Path(str(values.get("dataset_dir", "data")))
    if not (data_dir / _INFO_FILE).is_file() and (folder / data_dir / _INFO_FILE).is_file():
        data_dir = folder / data_dir
    selected = [name for name in names if not selection or name in selection] or list(selection)
    if len(selected) < len(names):
        remove_packing(draft)
    infos = _read_info_file(data_dir / _INFO_FILE)
    if stage == "pt":
        _convert_texts(infos, selected, data_dir, draft)
        remove_evaluation(draft)
        return draft
    _convert_datasets(infos, selected, data_dir, draft, _STAGES[stage])
    _convert_preference(stage, values, draft)
    if values.get("val_size") and any(infos[name].get("num_samples") for name in selected):
        draft.add_note(
            "num_samples: LLaMA-Factory splits off val_size after it selects num_samples rows; ftdata makes the test "
            "split from all rows, and selects the number of training rows with the key rows"
        )
    setting = f"template: {values['template']}" if values.get("template") else "template"
    draft.add_note(
        f"{setting}: LLaMA-Factory uses built-in templates, ftdata uses the chat template of the model; "
        "check the text with ftdata preview, or set template to a .jinja file"
    )
    remove_evaluation(draft)
    return draft


def _convert_weights(values: Mapping[str, Any], draft: Draft) -> None:
    tuning_type = values.get("finetuning_type", "lora")
    check_setting("", "finetuning_type", tuning_type, ("lora", "full"))
    if tuning_type == "full":
        draft.fields.pop("lora", None)
    if bits := values.get("quantization_bit"):
        method, kind = values.get("quantization_method", "bnb"), values.get("quantization_type", "nf4")
        name = {(4, "bnb", "nf4"): "nf4", (4, "bnb", "fp4"): "fp4"}.get((bits, method, kind))
        name = "int8" if (bits, method) == (8, "bnb") else name
        if name is None:
            raise conversion_error(
                f"quantization_bit is {bits}, the method is {method}, the type is {kind}; "
                "expected 4 bits (bnb, nf4 or fp4) or 8 bits (bnb)"
            )
        draft.set_field("quantization", name)


def _convert_lengths(values: Mapping[str, Any], draft: Draft) -> None:
    draft.set_field("overlong", "truncate")
    draft.add_note(
        "cutoff_len: LLaMA-Factory truncates the prompt and the answer of a turn; "
        "ftdata truncates the end of the text, or removes turns with overlong: drop_turns"
    )
    if values.get("packing") and not values.get("neat_packing"):
        draft.add_note("packing: documents in a packed sequence do not attend to each other, as with neat_packing")


def draft_from_dataset_info(values: Mapping[str, Any], selection: Sequence[str], folder: Path) -> Draft:
    """Convert data sets in a `dataset_info.json` to a draft of an ftdata configuration. The draft contains no model.

    Args:
        values: the content of the file.
        selection: names of the data sets to import. May be empty if the file contains only one data set.
        folder: folder of the file and of the data.

    Raises:
        UsageError: `cannot_import`.
    """
    draft = Draft()
    names = list(selection) or (list(values) if len(values) == 1 else [])
    if not names:
        problem = f"the file contains {len(values)} data sets, and none is selected"
        raise conversion_error(problem, hint=f"select data sets with --dataset: {', '.join(values)}")
    _convert_datasets(values, names, folder, draft, _find_task(values, names))
    return draft


def _read_info_file(path: Path) -> Mapping[str, Any]:
    try:
        infos = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{path} cannot be read: {describe_exception(error)}"
        raise conversion_error(problem, hint="set dataset_dir to the folder of this file") from None
    if not isinstance(infos, dict):
        raise conversion_error(f"{path} contains a {type(infos).__name__}, expected a mapping from names to data sets")
    return infos


def _convert_texts(infos: Mapping[str, Any], names: Sequence[str], folder: Path, draft: Draft) -> None:
    """Convert data sets of `stage: pt`, which trains all tokens of the column `prompt`."""
    _check_names(infos, names, folder)
    draft.set_field("data", [_make_source(name, infos[name], folder) for name in names])
    columns = {name: (infos[name].get("columns") or {}).get("prompt", "instruction") for name in names}
    options = {
        name: {"schema": "text", "template": TEXT_TEMPLATE, "columns": {"text": column} if column != "text" else None}
        for name, column in columns.items()
    }
    merge_dataset_options(options, draft)
    draft.set_field("packing", "bfd")
    draft.add_note(
        "stage pt: each text is one example, and packing does not cut it; LLaMA-Factory joins all texts and cuts them "
        "into blocks of cutoff_len"
    )


def _check_names(infos: Mapping[str, Any], names: Sequence[str], folder: Path) -> None:
    for name in names:
        if not isinstance(infos.get(name), Mapping):
            problem = f"{folder / _INFO_FILE} contains no data set {name!r}"
            raise conversion_error(problem, hint=suggest_names(name, infos))


def _find_task(infos: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the task of data sets of which all have pairs (`ranking`), or all have labels (`kto_tag`)."""
    selected = [infos[name] if isinstance(infos.get(name), Mapping) else {} for name in names]
    if all(info.get("ranking") for info in selected):
        return "preference"
    return "kto" if all((info.get("columns") or {}).get("kto_tag") for info in selected) else "sft"


def _convert_datasets(infos: Mapping[str, Any], names: Sequence[str], folder: Path, draft: Draft, task: str) -> None:
    """Convert data sets of conversations, of preference pairs (with the setting `ranking`), or of labeled answers."""
    _check_names(infos, names, folder)
    pairs = task in ("preference", "reward")
    for name in names:
        if task == "kto" and not (infos[name].get("columns") or {}).get("kto_tag"):
            raise conversion_error(f"{name}: the column kto_tag is missing, which stage: kto needs")
        if pairs != bool(infos[name].get("ranking")):
            problem = f"{name}: the setting ranking is {bool(infos[name].get('ranking'))}, expected {pairs}"
            hint = "ranking is for stage: dpo and rm; for other stages, remove it to train on the column chosen only"
            raise conversion_error(problem, hint=hint)
    draft.set_field("data", [_make_source(name, infos[name], folder) for name in names])
    if task != "sft":
        draft.set_field("task", task)
    convert = _pair_options if pairs else _labeled_options if task == "kto" else _row_options
    merge_dataset_options({name: convert(name, infos[name], draft) for name in names}, draft)


def _convert_preference(stage: str, values: Mapping[str, Any], draft: Draft) -> None:
    """Convert the settings of the stages for rated answers."""
    if _STAGES[stage] == "sft":
        return
    if draft.fields.pop("packing", None):
        draft.add_note("packing: left out, because rated answers are not packed")
    if stage == "rm":
        return
    if values.get("ref_model"):
        problem = "ref_model is another model, but ftdata uses the model before the training as the reference"
        raise conversion_error(problem, hint="remove ref_model")
    draft.set_field("train.beta", values.get("pref_beta", 0.1))
    if stage == "kto":
        draft.set_field("train.desirable_weight", values.get("kto_chosen_weight", 1.0))
        draft.set_field("train.undesirable_weight", values.get("kto_rejected_weight", 1.0))
        return
    loss = values.get("pref_loss", "sigmoid")
    check_setting("", "pref_loss", loss, ("sigmoid", "hinge", "ipo"), "use one of these losses")
    if share := values.get("pref_ftx"):
        draft.set_field("train.loss_type", [loss, "sft"])
        draft.set_field("train.loss_weights", [1.0, share])
    elif loss != "sigmoid":
        draft.set_field("train.loss_type", [loss])
    if smoothing := values.get("dpo_label_smoothing"):
        draft.set_field("train.label_smoothing", smoothing)


def _labeled_options(name: str, info: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    """Convert the columns of a data set for KTO: those of conversations, and the label."""
    columns = dict(info["columns"])
    label = columns.pop("kto_tag")
    options = _row_options(name, {**info, "columns": columns}, draft)
    mapping = options.get("columns", {}) | ({} if label in LABEL_COLUMNS else {"label": label})
    return {**options, **({"columns": mapping} if mapping else {})}


def _pair_options(name: str, info: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    """Convert the columns of a data set with preference pairs."""
    columns, kind = info.get("columns") or {}, info.get("formatting", "alpaca")
    check_setting(name, "formatting", kind, ("alpaca", "sharegpt", "openai"))
    note_unknown_keys(name, info, _KNOWN_KEYS, draft)
    if unsupported := [column for column in ("images", *_UNSUPPORTED_COLUMNS) if columns.get(column)]:
        raise conversion_error(f"{name}: columns {', '.join(unsupported)} are not supported")
    names = {key: columns.get(key) or key for key in ("chosen", "rejected")}
    if kind == "alpaca":
        names["instruction"] = columns.get("prompt") or "instruction"
        if query := columns.get("query"):
            names["input"] = query
            draft.add_note(
                f"{name}: prompt and query are joined by a blank line; LLaMA-Factory joins them by a line break"
            )
    else:
        _check_tags(name, info.get("tags") or {})
        names["messages"] = columns.get("messages") or "conversations"
    names |= {key: columns[key] for key in ("system", "history", "tools") if columns.get(key)}
    same = ("messages", "conversations")
    mapping = {key: column for key, column in names.items() if key != column and not {key, column} <= {*same}}
    return {"columns": mapping} if mapping else {}


def _make_source(name: str, info: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if info.get("script_url") or not (info.get("hf_hub_url") or info.get("file_name") or info.get("cloud_file_name")):
        problem = f"{name}: data from a script, or from a hub other than Hugging Face, cannot be imported"
        raise conversion_error(problem, hint="save the data as a file, and set file_name")
    if url := info.get("hf_hub_url"):
        source = {"path": url, "split": info.get("split") or "train"}
        source |= {"name": info["subset"]} if info.get("subset") else {}
        source |= {"data_files": f"{info['folder']}/**"} if info.get("folder") else {}
    else:
        source = {"path": info.get("cloud_file_name") or str(folder / info["file_name"])}
    rows = info.get("num_samples")
    if rows is not None and type(rows) is not int:
        raise conversion_error(f"{name}: num_samples is {rows!r:.60}, expected a number of rows")
    return {**source, **({"rows": rows} if rows else {})}


def _row_options(name: str, info: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    """Convert the settings of a LLaMA-Factory data set to the ftdata options `schema` and `columns`."""
    columns, kind = info.get("columns") or {}, info.get("formatting", "alpaca")
    check_setting(name, "formatting", kind, ("alpaca", "sharegpt", "openai"))
    note_unknown_keys(name, info, _KNOWN_KEYS, draft)
    implicit = [column for key, column in _OPTIONAL_COLUMNS.items() if not columns.get(key)]
    if kind == "alpaca" and (implicit := [column for column in implicit if column != "input" or columns]):
        draft.add_note(
            f"{name}: columns {', '.join(implicit)} are used if a row has them; "
            "LLaMA-Factory uses only configured columns"
        )
    if unsupported := [column for column in _UNSUPPORTED_COLUMNS if columns.get(column)]:
        raise conversion_error(f"{name}: columns {', '.join(unsupported)} are not supported")
    if columns.get("images"):
        draft.add_note(
            f"{name}: relative paths of images are resolved against media_dir, which is image_folder in ftdata"
        )
    if kind == "alpaca":
        if not columns or columns.get("query"):
            draft.add_note(
                f"{name}: prompt and query are joined by a blank line; LLaMA-Factory joins them by a line break"
            )
        renamed = {_COLUMNS.get(key, key): column for key, column in columns.items() if key != "tools"}
        mapping = {field: column for field, column in renamed.items() if field != column}
        return {"schema": "alpaca", **({"columns": mapping} if mapping else {})}
    _check_tags(name, info.get("tags") or {})
    draft.add_note(
        f"{name}: rows whose turns do not alternate are kept if the template accepts them; LLaMA-Factory skips them"
    )
    if kind == "openai":
        draft.add_note(f"{name}: system messages are not extended, and text next to tool calls is kept")
    messages_column = columns.get("messages") or "conversations"
    mapping = {"messages": messages_column} if messages_column not in ("messages", "conversations") else {}
    mapping |= {key: columns[key] for key in ("system", "tools", "images") if columns.get(key, key) != key}
    return {"columns": mapping} if mapping else {}


def _check_tags(name: str, tags: Mapping[str, str]) -> None:
    for tag, names in (("role_tag", ("from", "role", "speaker")), ("content_tag", ("value", "content", "text"))):
        check_setting(name, tag, tags.get(tag, names[0]), names, CONVERT_HINT)
    check_roles({tags[tag]: role for tag, role in _ROLE_TAGS.items() if tags.get(tag)}, name)
    tag, names = tags.get("function_tag", "function_call"), ("function_call", "function", "assistant")
    check_setting(name, "function_tag", tag, names, "rename the role to function_call in the data")
