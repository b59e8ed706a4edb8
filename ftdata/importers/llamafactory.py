"""LLaMA-Factory's `dataset_info.json` and training files, as in llamafactory 0.9.5 (`data/parser.py`, `hparams/`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ftdata.errors import describe_exception, suggest_names
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

INFO = "dataset_info.json"
_CHANGES = "it changes what is learnt, and ftdata has nothing like it"
_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}


def _layers(names: str) -> str | list[str]:
    return "all-linear" if names == "all" else names.replace(" ", "").split(",")


KEYS = KeyRules(
    rules={
        "model_name_or_path": "model",
        "output_dir": "output_dir",
        "cutoff_len": "max_length",
        "train_on_prompt": lambda yes: {"train_on": "all"} if yes else {},
        "mask_history": lambda yes: {"train_on": "last_assistant"} if yes else {},
        "packing": lambda yes: {"packing": "bfd"} if yes else {},
        "neat_packing": lambda yes: {"packing": "bfd"} if yes else {},
        "max_samples": "limit",
        "val_size": test_size_of,
        "seed": lambda seed: {"seed": seed, "train.seed": seed},
        "lora_rank": "lora.r",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "lora_target": lambda names: {"lora.target_modules": _layers(names)},
        "use_dora": "lora.use_dora",
        "use_rslora": "lora.use_rslora",
        "additional_target": lambda names: {"lora.modules_to_save": names.replace(" ", "").split(",")},
        "warmup_ratio": "train.warmup_steps",
        "early_stopping_steps": "early_stopping",
        "flash_attn": lambda how: {"attn_implementation": _ATTENTION[how]} if how in _ATTENTION else {},
        "disable_gradient_checkpointing": lambda yes: {"train.gradient_checkpointing": not yes},
        "use_dft_loss": lambda yes: {"train.loss_type": "dft"} if yes else {},
    },
    same={
        "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay",
        "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "tf32", "logging_steps",
        "save_steps", "save_strategy", "save_total_limit", "eval_strategy", "eval_steps", "load_best_model_at_end",
        "metric_for_best_model", "greater_is_better", "neftune_noise_alpha", "report_to", "run_name", "torch_compile",
        "dataloader_num_workers", "dataloader_pin_memory",
    },
    left={
        "do_train", "do_eval", "do_predict", "predict_with_generate", "preprocessing_num_workers", "use_fast_tokenizer",
        "preprocessing_batch_size", "overwrite_cache", "overwrite_output_dir", "plot_loss", "streaming", "buffer_size",
        "data_shared_file_system", "ddp_timeout", "enable_liger_kernel", "use_unsloth", "upcast_layernorm",
        "upcast_lmhead_output", "resume_from_checkpoint", "include_num_input_tokens_seen", "use_reentrant_gc",
        "cache_dir", "low_cpu_mem_usage", "save_only_model", "ray_run_name", "group_by_length", "double_quantization",
        "quantization_method", "quantization_type",
    },
    noted={
        "deepspeed": "is said to accelerate: accelerate launch --use_deepspeed ... -m ftdata train",
        "fsdp": "is said to accelerate: accelerate launch --use_fsdp ... -m ftdata train",
        "trust_remote_code": "left out: code of a model runs where you say so, --trust-remote-code",
        "pure_bf16": "left out: weights that are trained are float32, or an adapter's",
        "model_revision": "left out: download that revision, and name its folder as model",
        "tool_format": "left out: the model's template prints calls in its own way",
        "default_system": "left out: write it into the data, or into a template",
        "enable_thinking": "left out: rows have their own thinking, or none; template_kwargs is for templates that ask",
        "resize_vocab": "left out: tokens that the tokenizer has beyond the model get embeddings by themselves",
        "add_tokens": "left out: save a tokenizer with them, and name it as tokenizer",
        "add_special_tokens": "left out: save a tokenizer with them, and name it as tokenizer",
        "eval_dataset": "left out: held-out rows are those of test_size, or a split named test of the same data",
        "disable_shuffling": "left out: rows are trained in an order decided by seed and epoch",
    },
    refused={
        **dict.fromkeys(
            ("pissa_init", "loraplus_lr_ratio", "use_galore",
             "use_apollo", "use_badam", "use_adam_mini", "use_muon", "use_llama_pro", "use_asft_loss", "use_eaft_loss",
             "mixture_of_depths", "rope_scaling", "shift_attn", "interleave_probs", "freeze_trainable_layers",
             "adapter_name_or_path"),
            _CHANGES,
        ),
        "tokenized_path": "all other settings of data are passed over there: name that data itself",
    },
)  # fmt: skip
_USUAL = {
    "lora_rank": 8, "lora_target": "all",
    "cutoff_len": 2048, "learning_rate": 5e-5, "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "seed": 42,
}  # fmt: skip
_OWN = ("stage", "dataset", "dataset_dir", "template", "finetuning_type", "quantization_bit", "mix_strategy")
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_SHOWN = {"query": "input", "system": "system", "history": "history"}
_KNOWN = {
    "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name", "formatting", "ranking",
    "subset", "split", "folder", "num_samples", "columns", "tags",
}  # fmt: skip
_MEDIA = ("images", "videos", "audios", "kto_tag")
_MEANT = {
    "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "observation",
}  # fmt: skip


def draft_from_training_file(values: Mapping[str, Any], chosen: Sequence[str], folder: Path) -> Draft:
    """Return a draft of what a training file says, with the data sets that it names.

    Args:
        values: the file.
        chosen: which of its data sets; none: all.
        folder: where the file lies; where `dataset_dir` is looked for if it is not where the command is run.

    Raises:
        UsageError: `cannot_import`.
    """
    for key, only in (("stage", "sft"), ("mix_strategy", "concat")):
        if values.get(key, only) != only:
            raise conversion_error(f"{key}: {values[key]}, where ftdata knows {only}")
    draft, values = Draft(), explicit_settings(values, _USUAL)
    values.setdefault("lora_alpha", 2 * values["lora_rank"])
    apply_rules(values, KEYS, draft, but=_OWN)
    _weights(values, draft)
    _lengths(values, draft)
    named = [name.strip() for name in str(values.get("dataset") or "").split(",") if name.strip()]
    if not named:
        raise conversion_error("dataset: it names no data")
    place = Path(str(values.get("dataset_dir", "data")))
    if not (place / INFO).is_file() and (folder / place / INFO).is_file():
        place = folder / place
    _data(_read(place / INFO), [name for name in named if not chosen or name in chosen] or list(chosen), place, draft)
    told = f"template: {values['template']}" if values.get("template") else "template"
    draft.note(
        f"{told}: LLaMA-Factory has tables of its own, ftdata takes the model's chat template, as it will be used; "
        "compare with ftdata preview, or name a .jinja file as template"
    )
    remove_evaluation(draft)
    return draft


def _weights(values: Mapping[str, Any], draft: Draft) -> None:
    kind = values.get("finetuning_type", "lora")
    if kind not in ("lora", "full"):
        raise conversion_error(f"finetuning_type: {kind}, of which ftdata knows lora and full")
    if kind == "full":
        draft.fields.pop("lora", None)
    if bits := values.get("quantization_bit"):
        how, kind = values.get("quantization_method", "bnb"), values.get("quantization_type", "nf4")
        name = {(4, "bnb", "nf4"): "nf4", (4, "bnb", "fp4"): "fp4"}.get((bits, how, kind))
        name = "int8" if (bits, how) == (8, "bnb") else name
        if name is None:
            raise conversion_error(
                f"quantization: {bits} bits, {how}, {kind}, expected 4 or 8 bits of bnb, in nf4 or fp4"
            )
        draft.put("quantization", name)


def _lengths(values: Mapping[str, Any], draft: Draft) -> None:
    draft.put("overlong", "truncate")
    draft.note("cutoff_len: both ends of a turn are cut there; here the end of a text, or with drop_turns whole turns")
    if values.get("packing") and not values.get("neat_packing"):
        draft.note("packing: documents see each other there; here they do not, as with neat_packing")


def draft_from_dataset_info(values: Mapping[str, Any], chosen: Sequence[str], folder: Path) -> Draft:
    """Return a draft of data sets that a `dataset_info.json` lists; the model is still to be named.

    Args:
        values: the file.
        chosen: which of its data sets.
        folder: where the file lies, and so the data.

    Raises:
        UsageError: `cannot_import`.
    """
    draft = Draft()
    names = list(chosen) or (list(values) if len(values) == 1 else [])
    if not names:
        raise conversion_error(f"it lists {len(values)} data sets", hint=f"choose with --dataset: {', '.join(values)}")
    _data(values, names, folder, draft)
    return draft


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise conversion_error(
            f"{path} cannot be read: {describe_exception(error)}", hint="dataset_dir names its folder"
        ) from None
    if not isinstance(found, dict):
        raise conversion_error(f"{path} holds a {type(found).__name__}, expected names and data sets")
    return found


def _data(infos: Mapping[str, Any], names: Sequence[str], folder: Path, draft: Draft) -> None:
    for name in names:
        if not isinstance(infos.get(name), Mapping):
            raise conversion_error(f"no data set {name!r} in {folder / INFO}", hint=suggest_names(name, infos))
    draft.put("data", [_source(name, infos[name], folder) for name in names])
    merge_dataset_options({name: _kind(name, infos[name], draft) for name in names}, draft)


def _source(name: str, info: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if info.get("ranking"):
        raise conversion_error(
            f"{name}: ranking", hint="rows with chosen and rejected are read without it: their chosen side is trained"
        )
    if info.get("script_url") or not (info.get("hf_hub_url") or info.get("file_name") or info.get("cloud_file_name")):
        raise conversion_error(
            f"{name}: it comes from a script or another hub", hint="save it as a file, and name that"
        )
    if url := info.get("hf_hub_url"):
        found = {"path": url, "split": info.get("split") or "train"}
        found |= {ours: info[theirs] for theirs, ours in (("subset", "name"),) if info.get(theirs)}
        found |= {"data_files": f"{info['folder']}/**"} if info.get("folder") else {}
    else:
        found = {"path": info.get("cloud_file_name") or str(folder / info["file_name"])}
    rows = info.get("num_samples")
    if rows is not None and type(rows) is not int:
        raise conversion_error(f"{name}: num_samples is {rows!r:.60}, expected a number of rows")
    return {**found, **({"rows": rows} if rows else {})}


def _kind(name: str, info: Mapping[str, Any], draft: Draft) -> dict[str, Any]:
    """Return what a data set says of its rows: schema and columns."""
    columns, kind = info.get("columns") or {}, info.get("formatting", "alpaca")
    note_unknown_keys(name, info, _KNOWN, draft)
    shown = [ours for theirs, ours in _SHOWN.items() if not columns.get(theirs)]
    if kind == "alpaca" and (shown := [one for one in shown if one != "input" or columns]):
        draft.note(f"{name}: columns of the name {', '.join(shown)} are read if rows have them; there only when named")
    if media := [one for one in _MEDIA if columns.get(one)]:
        raise conversion_error(f"{name}: columns {', '.join(media)}, where ftdata trains on texts")
    if kind == "alpaca":
        if not columns or columns.get("query"):
            draft.note(f"{name}: prompt and query are joined by a blank line here, and by a line break there")
        renamed = {_COLUMNS.get(theirs, theirs): ours for theirs, ours in columns.items() if theirs != "tools"}
        mapped = {ours: theirs for ours, theirs in renamed.items() if ours != theirs}
        return {"schema": "alpaca", **({"columns": mapped} if mapped else {})}
    if kind not in ("sharegpt", "openai"):
        raise conversion_error(f"{name}: formatting {kind}")
    _tags(name, info.get("tags") or {})
    draft.note(
        f"{name}: rows that LLaMA-Factory skips, since turns do not alternate, are kept where the template takes them"
    )
    if kind == "openai":
        draft.note(f"{name}: no words are put into system messages, and text beside calls stays")
    theirs = columns.get("messages") or "conversations"
    mapped = {"messages": theirs} if theirs not in ("messages", "conversations") else {}
    mapped |= {ours: columns[ours] for ours in ("system", "tools") if columns.get(ours, ours) != ours}
    return {"columns": mapped} if mapped else {}


def _tags(name: str, tags: Mapping[str, str]) -> None:
    for tag, known in (("role_tag", ("from", "role", "speaker")), ("content_tag", ("value", "content", "text"))):
        if tags.get(tag, known[0]) not in known:
            raise conversion_error(
                f"{name}: {tag} is {tags[tag]!r}",
                hint="make messages of rows by a function: schema='./mine.py:convert'",
            )
    check_roles({tags[tag]: meant for tag, meant in _MEANT.items() if tags.get(tag)}, name)
    if tags.get("function_tag", "function_call") not in ("function_call", "function", "assistant"):
        raise conversion_error(
            f"{name}: function_tag is {tags['function_tag']!r}", hint="rename it in the data to function_call"
        )
