"""Train models with TRL's `SFTTrainer` or `DPOTrainer`, then compare, prompt or merge the trained models.

Only this package uses torch, transformers, trl, peft and bitsandbytes. It imports them when a function is called,
not when the package is imported. An example with a model that is created on the spot:

    >>> import json, logging, pathlib, tempfile
    >>> import transformers
    >>> from ftdata.testing import byte_tokenizer
    >>> transformers.logging.disable_progress_bar()
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> tokens = {"eos_token": "<|im_end|>", "pad_token": "<|im_start|>"}
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **tokens)
    >>> _ = tokenizer.save_pretrained(folder / "model")
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> config = transformers.LlamaConfig(vocab_size=258, max_position_embeddings=256, **sizes)
    >>> transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    >>> data, model = str(folder / "data.json"), str(folder / "model")
    >>> rows = [{"question": f"Say {n}.", "answer": f"It is {n}."} for n in range(4)]
    >>> _ = pathlib.Path(data).write_text(json.dumps(rows))
    >>> dry_run(data, model=model, output_dir="out", template="chatml")[0].trained_tokens
    36
    >>> settings = {"max_steps": 2, "disable_tqdm": True}
    >>> out = run(data, model=model, output_dir=folder / "out", template="chatml", lora_r=2, settings=settings)
    >>> sorted(path.name for path in (out / "model").iterdir())[:2]
    ['README.md', 'adapter_config.json']
    >>> len(generate(out, ["Say 2."], max_new_tokens=4))
    1
    >>> isinstance(start_chat(out, max_new_tokens=4).say("Say 2."), str)
    True
    >>> len(compare(out, n=2, max_new_tokens=4).rows)
    2
    >>> merge(out, folder / "merged").error < 1e-4
    True
    >>> "max_length: " in init(data, model, template="chatml")
    True
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftdata.build.remote import find_build
from ftdata.build.store import read_manifest
from ftdata.config import (
    NULL,
    Config,
    check_data_not_redacted,
    flatten_sections,
    is_config_file,
    load_config,
    make_config,
    parse_settings,
    read_config_file,
)
from ftdata.errors import MissingDependency, UsageError
from ftdata.options import TASKS
from ftdata.redaction import drop_redacted
from ftdata.tokenizing.load import load_tokenizer

if TYPE_CHECKING:
    from ftdata.train.inference.chat import ChatSession
    from ftdata.train.inference.comparison_report import Comparison
    from ftdata.train.inference.merge_adapter import MergedModel
    from ftdata.train.model.estimate import Estimate

__all__ = ["compare", "dry_run", "generate", "init", "merge", "run", "start_chat"]

_ENVIRONMENT_VARIABLES = {"hub_token": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
"""Setting -> environment variables that its library reads if the setting is missing."""

REQUIRED_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "matplotlib", "sacrebleu")


def run(
    source: Any,
    *,
    model: str | None = None,
    output_dir: str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] | None = None,
    resume: bool = False,
    **overrides: Any,
) -> Path:
    """Train a model. If `source` is data instead of a finished build, build the data set first.

    Args:
        source: a config file (`.yaml`, `.yml`, `.toml`), the folder of a build, the folder of a run to resume, or data
            in any form that `build_sft_dataset` accepts: a path or URL, a mapping, or a list of these.
        model: folder or Hub id of the base model.
        output_dir: folder for the run: checkpoints, the model, `config.yaml`, `run.json`, the loss as an image and as
            numbers, `samples.jsonl`.
        settings: fields of the configuration of TRL's trainer, such as `SFTConfig`, as a mapping or as
            `["learning_rate=1e-4", "lora.r=8"]`.
        resume: whether to resume from the last intact checkpoint in `output_dir`.
        overrides: further fields of `Config`.

    Returns:
        The folder of the run.

    Raises:
        UsageError: a field is unknown or missing, or contradicts another field.
        InputRefused: the data, the model or the checkpoints cannot be used.
        MissingDependency: the `train` extra is not installed.
        StorageError: a write fails; sealed checkpoints are kept.
        HubError: the data, the model or the tokenizer cannot be downloaded.
    """
    _check_installed()
    config, build = _resolve(source, model, output_dir, _merge_settings(overrides, settings), resume=resume)
    _silence_libraries()
    from ftdata.train.runs import train_model

    notes = tuple(_describe_redacted_settings(source, config, resume=resume))
    return train_model.train_model(config, build, resume=resume, notes=notes)


def dry_run(
    source: Any,
    *,
    model: str | None = None,
    output_dir: str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] | None = None,
    **overrides: Any,
) -> tuple[Estimate, list[str]]:
    """Estimate the memory, steps and time of a training run, without writing any files.

    Args:
        source: the same as for `run`.
        model: folder or Hub id of the base model.
        output_dir: folder for the run, which is not created.
        settings: as for `run`.
        overrides: further fields of `Config`.

    Returns:
        The estimate: parameters, data, steps, compute (FLOP), memory (bytes) and time (seconds); and notes, which say
        whether rows are padded, and whether the training cannot start because `output_dir` contains a run.

    Raises:
        UsageError: see `run`.
        InputRefused: see `run`; also if the run does not fit into memory, or if packed documents attend to each other.
        MissingDependency: the `train` extra is not installed.
    """
    _check_installed()
    config, build = _resolve(source, model, output_dir, _merge_settings(overrides, settings))
    _silence_libraries()
    from ftdata.train.runs import train_model

    return train_model.estimate_training(config, build)


def compare(run_dir: str | Path, data: Any = None, n: int | None = 20, **options: Any) -> Comparison:
    """Give the same prompts to the base model and to the tuned model, and compare the answers.

    Args:
        run_dir: the folder of a finished run.
        data: prompts with expected answers, in any form that `build_sft_dataset` accepts; `None` selects the test split
            of the run's build, or the train split of a build without a test split.
        n: number of rows; `None` selects all rows.
        options: `batch_size`, `trust_remote_code`, `image_folder` and `download_images` (as in `build_sft_dataset`),
            `progress` (called after each token with an `ftdata.train.inference.progress.GenerationProgress`), and
            further arguments of `model.generate`, such as `num_beams`.

    Returns:
        Perplexity, exact match, SacreBLEU and chrF of both models, and every answer.

    Raises:
        UsageError: the folder is not a finished run, or `model.generate` does not accept an option.
        InputRefused: no row of the data has a prompt and an answer, or the model is damaged.
        MissingDependency: the `train` extra is not installed.
    """
    _check_installed()
    _silence_libraries()
    from ftdata.train.inference import evaluation

    return evaluation.compare_models(Path(run_dir), data, n, **options)


def generate(run_dir: str | Path, prompts: Sequence[str], *, base: bool = False, **options: Any) -> list[str]:
    """Generate answers to prompts with the model of a finished run.

    Args:
        run_dir: the folder of the run.
        prompts: user messages, each the start of a separate conversation.
        base: whether to use the base model instead.
        options: `batch_size`, `trust_remote_code`, `seed` for sampling, and further arguments of `model.generate`.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        UsageError: the folder is not a finished run, or `model.generate` does not accept an option.
        InputRefused: the template cannot render a prompt, or the model is damaged.
        MissingDependency: the `train` extra is not installed.
    """
    session = start_chat(run_dir, base=base, **options)
    return session.generate_answers([[{"role": "user", "content": text}] for text in prompts])


def start_chat(
    run_dir: str | Path,
    *,
    base: bool = False,
    system: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> ChatSession:
    """Start a chat session with the model of a finished run. Its method `say(text)` returns the model's answer.

    Args:
        run_dir: the folder of the run.
        base: whether to use the base model instead.
        system: a system message.
        trust_remote_code: whether Python code that comes with the model may run.
        options: further arguments of `model.generate`.

    Returns:
        The session, which stores the conversation in `.messages`.

    Raises:
        UsageError: the folder is not a finished run, or `model.generate` does not accept an option.
        InputRefused: the model is damaged.
        MissingDependency: the `train` extra is not installed.
    """
    _check_installed()
    _silence_libraries()
    from ftdata.train.inference import chat
    from ftdata.train.inference.run_dir import open_run

    run = open_run(Path(run_dir), trust_remote_code=trust_remote_code)
    return chat.start_session(run, base=base, system=system, **options)


def merge(
    run_dir: str | Path, output_dir: str | Path, *, dtype: str | None = None, trust_remote_code: bool = False
) -> MergedModel:
    """Merge the adapter of a run into the base model, and save the merged model.

    The weights are added in float32, then rounded to `dtype`.

    Args:
        run_dir: the folder of a finished run.
        output_dir: a new folder, for a model that needs neither ftdata nor PEFT.
        dtype: dtype of the merged weights: `float32`, `bfloat16` or `float16`; `None` keeps the base model's dtype.
        trust_remote_code: whether Python code that comes with the model may run.

    Returns:
        The folder, the dtype, and `error`: the largest difference between the logits of the merged model and those of
        the base model with its adapter, over ordinary tokens, divided by the largest logit, computed in float32.

    Raises:
        UsageError: the run has no adapter, or the folder is not empty.
        InputRefused: the base model or the adapter is damaged; or the error is above the limit of the dtype, 1e-3 for
            float32 and 5e-2 for 16 bits, and nothing is written.
        MissingDependency: the `train` extra is not installed.
    """
    _check_installed()
    _silence_libraries()
    from ftdata.train.inference import merge_adapter
    from ftdata.train.inference.run_dir import open_run

    run = open_run(Path(run_dir), trust_remote_code=trust_remote_code)
    return merge_adapter.merge_into_base(run, Path(output_dir), dtype)


def init(data: str, model: str, output_dir: str | Path = "run", **overrides: Any) -> str:
    """Return a commented YAML configuration with values chosen for the given data and model.

    Args:
        data: a file, or any other text that `build_sft_dataset` accepts as data.
        model: folder or Hub id of the base model.
        output_dir: folder for the run.
        overrides: fields of `Config` with fixed values.

    Returns:
        YAML, with a comment for each value.

    Raises:
        UsageError: an option is invalid; or the data is `-`, because standard input can be read only once.
        HubError: the model or the data cannot be downloaded.
        InputRefused: the data cannot be read, or no row can be built.
        MissingDependency: the `train` extra is not installed.
    """
    _check_installed()
    _silence_libraries()
    from ftdata.train import init_config

    return init_config.make_init_config(data, model, str(output_dir), overrides)


def _check_installed() -> None:
    missing = [name for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        message = f"training needs packages that are not installed: {', '.join(missing)}"
        raise MissingDependency("missing_train", message, hint="pip install 'ftdata[train]'")


def _silence_libraries() -> None:
    # Progress bars for loading a few tensors, and warnings about settings that ftdata chooses, hide important output.
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("trl", "peft", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated", FutureWarning)
    # PEFT looks for the layers of experts under names that some models do not use.
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
    # The embedding layers are saved on purpose: they contain new tokens, which are trained.
    warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`", UserWarning)


def _resolve(
    source: str | Path,
    model: str | None,
    output_dir: str | Path | None,
    overrides: dict[str, Any],
    *,
    resume: bool = False,
) -> tuple[Config, Path | None]:
    """Return the configuration of a run, and the folder of its build. The folder is `None` if no build exists yet."""
    is_path = isinstance(source, str | Path)
    path = Path(source if is_path else "")
    if (rank := overrides.pop("lora_r", None)) is not None:
        lora = overrides.get("lora")
        overrides["lora"] = {**(lora if isinstance(lora, dict) else {}), "r": rank}
    fields = {**overrides, "model": model or overrides.get("model")}
    fields["output_dir"] = str(output_dir) if output_dir else overrides.get("output_dir")
    if (path / "run.json").is_file() and not (path / "manifest.json").is_file():
        return _resolve_run_dir(path, fields, resume=resume)
    build = find_build(source)
    if is_config_file(path):
        config = load_config(path, **fields)
        build = find_build(config.data)
        if build is None:
            check_data_not_redacted(config, path)
            return config, None
        defaults = make_config({"data": config.data}, model=config.model, output_dir=config.output_dir).build_options()
        changed = {name: value for name, value in config.build_options().items() if value != defaults[name]}
        _check_build_options(build, changed)
        expected = read_manifest(build)["options"]["tokenizer"]["fingerprint"]
        if config.tokenizer and load_tokenizer(config.tokenizer).fingerprint != expected:
            message = f"{config.data} is a finished build, so the tokenizer cannot change"
            raise UsageError("already_built", message, hint="build the data again")
        return config, build
    if resume and is_path and not path.is_file() and not fields["model"]:
        hint = "run the command that started the run again"
        raise UsageError("nothing_to_resume", f"{source} contains no run to resume", hint=hint)
    for name, value in (("--model", fields["model"]), ("--output-dir", fields["output_dir"])):
        if not value:
            raise UsageError("missing_option", f"training on {source} needs the option {name}")
    if build is not None:
        config = make_config({"data": str(source)}, **fields)
        _check_build_options(build, _explicit_build_options(fields))
        return config, build
    return make_config({"data": str(source) if is_path else source}, **fields), None


def _describe_redacted_settings(source: Any, config: Config, *, resume: bool) -> Iterator[str]:
    """Yield a note for each redacted secret in a saved configuration, unless the user passed the secret again."""
    path = Path(source) / "config.yaml" if resume and isinstance(source, str | Path) else source
    if not is_config_file(path) or not Path(path).is_file():
        return
    for name in drop_redacted(read_config_file(Path(path)))[1]:
        section, dot, field = name.partition(".")
        value = getattr(config, section, None)
        if not dot or (isinstance(value, Mapping) and field in value):
            continue
        variables = _ENVIRONMENT_VARIABLES.get(field, ())
        variable = next((variable for variable in variables if os.environ.get(variable)), None)
        origin = f"the value is taken from {variable}" if variable else f"pass the value again with --set {name}=..."
        yield f"{name} was redacted in {path}: {origin}"


def _resolve_run_dir(run_dir: Path, fields: dict[str, Any], *, resume: bool) -> tuple[Config, Path | None]:
    """Return the configuration of a run to resume, and the folder of its build."""
    if not (run_dir / "config.yaml").is_file():
        hint = "pass a configuration file or data instead"
        raise UsageError("not_a_run", f"{run_dir} contains no config.yaml", hint=hint)
    if not resume:
        raise UsageError("run_exists", f"{run_dir} already contains a run", hint="resume it with --resume")
    if fields.get("output_dir") and Path(fields["output_dir"]).resolve() != run_dir.resolve():
        message = f"the run in {run_dir} cannot be resumed in another folder"
        raise UsageError("run_exists", message, hint="remove --output-dir")
    # The user decides whether code is trusted. A saved configuration may come from somebody else.
    fixed = {"output_dir": str(run_dir), "trust_remote_code": bool(fields.get("trust_remote_code"))}
    config = load_config(run_dir / "config.yaml", **{**fields, **fixed})
    build = find_build(config.data) or run_dir / "data"
    _check_build_options(build, _explicit_build_options(fields))
    return config, build


def _explicit_build_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the build options that differ from their defaults, and the options that the user set to null."""
    config = make_config({"data": "", "model": "", "output_dir": ""}, **fields)
    defaults = make_config({"data": "", "model": "", "output_dir": ""}).build_options()
    nulls = {name for name, value in flatten_sections(fields).items() if value is NULL}
    values = config.build_options().items()
    options = {name: value for name, value in values if value != defaults[name] or name in nulls}
    if options.get("template", "") is None:
        options["template"] = "tokenizer"
    return options


def _check_build_options(build: Path, requested: Mapping[str, Any]) -> None:
    """Raise an error if the user requests a value of an option that differs from the value in a finished build.

    The seed may differ, because it is also a training option.
    """
    options = read_manifest(build)["options"]
    template = options["template"]
    built = {
        "task": "sft",
        **options,
        "template": template["name"],
        "template_kwargs": template["kwargs"],
        "date": template["date"][:10],
    }
    # Several trainers can use the same kind of data.
    wanted = {name: TASKS.get(value, value) if name == "task" else value for name, value in requested.items()}
    differing = [name for name, value in wanted.items() if name in built and built[name] != value and name != "seed"]
    if differing:
        message = f"{build} is a finished build, so these options cannot change: {', '.join(differing)}"
        hint = "build the data again with these options, or train from the original data"
        raise UsageError("already_built", message, hint=hint)


def _merge_settings(overrides: dict[str, Any], settings: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Combine the keyword arguments of `run` and the fields in `settings` into one dict."""
    if settings is None:
        return overrides
    added = {"train": dict(settings)} if isinstance(settings, Mapping) else parse_settings(settings)
    # The command line passes None for each option without a value.
    if twice := sorted(name for name in overrides.keys() & added.keys() if overrides[name] is not None):
        raise UsageError("setting", f"these fields are set both in settings and as arguments: {', '.join(twice)}")
    return {**overrides, **added}
