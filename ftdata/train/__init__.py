"""Train: a thin hand-over of a finished build to TRL's `SFTTrainer`, and what comes before and after it.

This package is the only one that knows torch, transformers, trl, peft and bitsandbytes, and it imports them
when a function is called, not before. All of it, on a model that is made on the spot:

    >>> import json, logging, pathlib, tempfile
    >>> import transformers
    >>> from ftdata.testing import byte_tokenizer
    >>> transformers.logging.disable_progress_bar()
    >>> place = pathlib.Path(tempfile.mkdtemp())
    >>> tokens = {"eos_token": "<|im_end|>", "pad_token": "<|im_start|>"}
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **tokens)
    >>> _ = tokenizer.save_pretrained(place / "model")
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> config = transformers.LlamaConfig(vocab_size=258, max_position_embeddings=256, **sizes)
    >>> transformers.LlamaForCausalLM(config).save_pretrained(place / "model")
    >>> data, model = str(place / "data.json"), str(place / "model")
    >>> rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(4)]
    >>> _ = pathlib.Path(data).write_text(json.dumps(rows))
    >>> dry_run(data, model=model, output_dir="out", template="chatml")[0].trained_tokens
    36
    >>> settings = {"max_steps": 2, "disable_tqdm": True}
    >>> out = run(data, model=model, output_dir=place / "out", template="chatml", lora_r=2, settings=settings)
    >>> sorted(path.name for path in (out / "model").iterdir())[:2]
    ['README.md', 'adapter_config.json']
    >>> len(generate(out, ["What is 2?"], max_new_tokens=4))
    1
    >>> isinstance(start_chat(out, max_new_tokens=4).say("What is 2?"), str)
    True
    >>> len(compare(out, n=2, max_new_tokens=4).rows)
    2
    >>> merge(out, place / "merged").error < 1e-4
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
from ftdata.config import NULL, Config, flatten_sections, load_config, make_config, parse_settings, read_config_file
from ftdata.errors import MissingDependency, UsageError
from ftdata.redaction import drop_redacted, is_redacted
from ftdata.tokenizing.load import load_tokenizer

if TYPE_CHECKING:
    from ftdata.train.inference.chat import ChatSession
    from ftdata.train.inference.comparison_report import Comparison
    from ftdata.train.inference.merge_adapter import MergedModel
    from ftdata.train.model.estimate import Estimate

__all__ = ["compare", "dry_run", "generate", "init", "merge", "run", "start_chat"]

_VARIABLES = {"hub_token": ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
"""Setting -> environment variables that its library reads where the setting is missing."""

NEEDED = ("torch", "transformers", "trl", "peft", "accelerate", "matplotlib", "sacrebleu")


def run(
    source: Any,
    *,
    model: str | None = None,
    output_dir: str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] | None = None,
    resume: bool = False,
    **overrides: Any,
) -> Path:
    """Train a model; build the data first where `source` is not a build yet.

    Args:
        source: a config file (`.yaml`, `.yml`, `.toml`), the folder of a build, the folder of a run that is to go on,
            or data as `build_sft_dataset` takes: a place, a mapping, or a list of these.
        model: folder or hub id of the base model.
        output_dir: folder for the run: checkpoints, the model, `config.yaml`, `run.json`, the loss as picture and
            figures, `samples.jsonl`.
        settings: fields of TRL's `SFTConfig`, as a mapping or as `["learning_rate=1e-4", "lora.r=8"]`.
        resume: go on from the last whole checkpoint in `output_dir`.
        overrides: further fields of `Config`.

    Returns:
        The folder of the run.

    Raises:
        UsageError: a field is unknown, missing or contradicts another.
        InputRefused: data, model or checkpoints cannot be used as they are.
        MissingDependency: the `train` extra is not installed.
        StorageError: the disk refuses; what was sealed before stays.
        HubError: data, model or tokenizer cannot be had.
    """
    _require()
    config, build = _resolve(source, model, output_dir, _given(overrides, settings), resume=resume)
    _quiet()
    from ftdata.train.runs import sft

    return sft.train_sft(config, build, resume=resume, notes=tuple(_left_out(source, config, resume=resume)))


def dry_run(
    source: Any,
    *,
    model: str | None = None,
    output_dir: str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] | None = None,
    **overrides: Any,
) -> tuple[Estimate, str]:
    """Work out what `run` would do, and leave nothing.

    Args:
        source: as for `run`, and so all others.
        model: folder or hub id of the base model.
        output_dir: folder for the run, which is not made.
        settings: fields of TRL's `SFTConfig`.
        overrides: further fields of `Config`.

    Returns:
        Parameters, data, steps, computing (FLOP), memory (bytes) and time (seconds); and a note on how rows are put
        together, or nothing.

    Raises:
        UsageError: as `run`.
        InputRefused: as `run`; the run does not fit, or the model leaks.
        MissingDependency: the `train` extra is not installed.
    """
    _require()
    config, build = _resolve(source, model, output_dir, _given(overrides, settings))
    _quiet()
    from ftdata.train.runs import sft

    return sft.estimate_sft(config, build)


def compare(run_dir: str | Path, data: Any = None, n: int | None = 20, **options: Any) -> Comparison:
    """Ask base and tuned model the same questions.

    Args:
        run_dir: the folder of a finished run.
        data: questions with their expected answers, as `build_sft_dataset` takes data; `None` takes the run's own: its
            test split, if there is one.
        n: how many rows; `None` takes all.
        options: `batch_size`, `trust_remote_code`, `progress` (called after each token with an
            `ftdata.train.inference.progress.GenerationProgress`), and further arguments of `model.generate`, such as `num_beams`.

    Returns:
        Perplexity, exact match, SacreBLEU and chrF of both, and every answer.

    Raises:
        UsageError: the folder is no finished run, or an option is none of `model.generate`.
        InputRefused: the data has no row that can be asked, or the model is damaged.
        MissingDependency: the `train` extra is not installed.
    """
    _require()
    _quiet()
    from ftdata.train.inference import evaluation

    return evaluation.compare_models(Path(run_dir), data, n, **options)


def generate(run_dir: str | Path, prompts: Sequence[str], *, base: bool = False, **options: Any) -> list[str]:
    """Answer prompts with the model of a finished run.

    Args:
        run_dir: the folder of the run.
        prompts: what a user says, each by itself.
        base: ask the base model instead.
        options: `batch_size`, `trust_remote_code`, `seed` for sampling, and further arguments of `model.generate`.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        UsageError: the folder is no finished run, or an option is none of `model.generate`.
        InputRefused: a prompt cannot be put into the template, or the model is damaged.
        MissingDependency: the `train` extra is not installed.
    """
    return start_chat(run_dir, base=base, **options).answers([[{"role": "user", "content": text}] for text in prompts])


def start_chat(
    run_dir: str | Path,
    *,
    base: bool = False,
    system: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> ChatSession:
    """Begin a conversation with the model of a finished run: `.say(text)` returns its answer.

    Args:
        run_dir: the folder of the run.
        base: talk with the base model instead.
        system: a system message.
        trust_remote_code: whether Python code that comes with the model may run.
        options: further arguments of `model.generate`.

    Returns:
        The conversation, which remembers what was said, in `.messages`.

    Raises:
        UsageError: the folder is no finished run, or an option is none of `model.generate`.
        InputRefused: the model is damaged.
        MissingDependency: the `train` extra is not installed.
    """
    _require()
    _quiet()
    from ftdata.train.inference import chat
    from ftdata.train.inference.run_dir import open_run

    run = open_run(Path(run_dir), trust_remote_code=trust_remote_code)
    return chat.start_session(run, base=base, system=system, **options)


def merge(
    run_dir: str | Path, output_dir: str | Path, *, dtype: str | None = None, trust_remote_code: bool = False
) -> MergedModel:
    """Write the base model with a run's adapter merged into it: added in float32, and rounded once.

    Args:
        run_dir: the folder of a finished run.
        output_dir: a new folder, for a model that needs neither ftdata nor PEFT.
        dtype: of the new weights: `float32`, `bfloat16` or `float16`; `None` takes that of the base model.
        trust_remote_code: whether Python code that comes with the model may run.

    Returns:
        The folder, the dtype, and `error`: how far the merged model's logits are off those of base and adapter, as the
        largest difference over ordinary tokens, divided by the largest logit, in float32.

    Raises:
        UsageError: the run has no adapter, or the folder is not empty.
        InputRefused: the base model or the adapter is damaged; or the error is above the limit of the dtype, 1e-3 for
            float32 and 5e-2 for 16 bits, and nothing is written.
        MissingDependency: the `train` extra is not installed.
    """
    _require()
    _quiet()
    from ftdata.train.inference import merge_adapter
    from ftdata.train.inference.run_dir import open_run

    run = open_run(Path(run_dir), trust_remote_code=trust_remote_code)
    return merge_adapter.merge_into_base(run, Path(output_dir), dtype)


def init(data: str, model: str, output_dir: str | Path = "out", **overrides: Any) -> str:
    """Return a commented configuration for some data and a model, with values worked out from both.

    Args:
        data: a file, or whatever else `build_sft_dataset` takes as text.
        model: folder or hub id of the base model.
        output_dir: folder for the run.
        overrides: fields of `Config` that are decided already.

    Returns:
        YAML, with a comment at each value.

    Raises:
        UsageError: an option is invalid; or the data is `-`, which a run could not read once more.
        HubError: model or data cannot be had.
        InputRefused: the data cannot be read, or nothing of it be built.
        MissingDependency: the `train` extra is not installed.
    """
    _require()
    _quiet()
    from ftdata.train import init_config

    return init_config.make_init_config(data, model, str(output_dir), overrides)


def _require() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            "missing_train", f"training needs {', '.join(missing)}", hint="pip install 'ftdata[train]'"
        )


def _quiet() -> None:
    # Bars for loading twenty tensors, and advice about settings that ftdata has decided, hide what matters.
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("trl", "peft", "accelerate", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated", FutureWarning)
    # What peft asks of layers of experts, and does not find in models that have them otherwise.
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys", RuntimeWarning)
    # So they are: they have new tokens, which are trained.
    warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`", UserWarning)


def _resolve(
    source: str | Path,
    model: str | None,
    output_dir: str | Path | None,
    overrides: dict[str, Any],
    *,
    resume: bool = False,
) -> tuple[Config, Path | None]:
    named = isinstance(source, str | Path)
    path = Path(source if named else "")
    if (rank := overrides.pop("lora_r", None)) is not None:
        lora = overrides.get("lora")
        overrides["lora"] = {**(lora if isinstance(lora, dict) else {}), "r": rank}
    given = {**overrides, "model": model or overrides.get("model")}
    given["output_dir"] = str(output_dir) if output_dir else overrides.get("output_dir")
    if (path / "run.json").is_file() and not (path / "manifest.json").is_file():
        return _begun(path, given, resume=resume)
    build = find_build(source)
    if path.suffix in (".yaml", ".yml", ".toml"):
        config = load_config(path, **given)
        build = find_build(config.data)
        if build is None:
            _check_not_redacted(config, path)
            return config, None
        plain = make_config({"data": config.data}, model=config.model, output_dir=config.output_dir).build_options()
        asked = {name: value for name, value in config.build_options().items() if value != plain[name]}
        _check_built(build, asked)
        if config.tokenizer and load_tokenizer(config.tokenizer).fingerprint != _tokenizer_of(build):
            raise UsageError("already_built", f"tokenizer cannot change: {config.data} is built", hint="build again")
        return config, build
    if resume and named and not path.is_file() and not given["model"]:
        hint = "begin it again, as it was begun"
        raise UsageError("nothing_to_resume", f"{source} holds no run that has begun", hint=hint)
    for name, value in (("--model", given["model"]), ("--output-dir", given["output_dir"])):
        if not value:
            raise UsageError("missing_option", f"training on {source} needs {name}")
    if build is not None:
        config = make_config({"data": str(source)}, **given)
        _check_built(build, _built_by(given))
        return config, build
    return make_config({"data": str(source) if named else source}, **given), None


def _check_not_redacted(config: Config, file: Path) -> None:
    """Refuse a kept configuration whose data cannot be read again without the secret that was removed from it."""
    if is_redacted(config.data):
        raise UsageError(
            "redacted",
            "data has a part that was redacted when the file was kept",
            where=str(file),
            hint="pass the data again, with its credentials: --set data=...",
        )


def _left_out(source: Any, config: Config, *, resume: bool) -> Iterator[str]:
    """Yield a note for each secret that a kept configuration lacks, and that no one has passed again."""
    path = Path(source) / "config.yaml" if resume and isinstance(source, str | Path) else source
    if not isinstance(path, str | Path) or Path(path).suffix not in (".yaml", ".yml", ".toml"):
        return
    if not Path(path).is_file():
        return
    for name in drop_redacted(read_config_file(Path(path)))[1]:
        section, dot, field = name.partition(".")
        kept = getattr(config, section, None)
        if not dot or (isinstance(kept, Mapping) and field in kept):
            continue
        variable = next((each for each in _VARIABLES.get(field, ()) if os.environ.get(each)), None)
        source_of = f"taken from {variable}" if variable else f"left out; pass it again with --set {name}=..."
        yield f"{name} was redacted in {path}: {source_of}"


def _begun(run_dir: Path, given: dict[str, Any], *, resume: bool) -> tuple[Config, Path | None]:
    """Return the configuration that a run was begun with, and the data that it was begun on."""
    if not (run_dir / "config.yaml").is_file():
        raise UsageError("not_a_run", f"{run_dir} keeps no config.yaml", hint="name the configuration, or the data")
    if not resume:
        raise UsageError("run_exists", f"{run_dir} holds a run already", hint="go on with --resume")
    if given.get("output_dir") and Path(given["output_dir"]).resolve() != run_dir.resolve():
        raise UsageError("run_exists", f"{run_dir} goes on where it is", hint="leave --output-dir out")
    # What a folder says of code to be trusted is whoever made it; what the command says is the user.
    own = {"output_dir": str(run_dir), "trust_remote_code": bool(given.get("trust_remote_code"))}
    config = load_config(run_dir / "config.yaml", **{**given, **own})
    build = find_build(config.data) or run_dir / "data"
    _check_built(build, _built_by(given))
    return config, build


def _built_by(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is asked of a build, nothing included where that is what was said."""
    config = make_config({"data": "", "model": "", "output_dir": ""}, **given)
    plain = make_config({"data": "", "model": "", "output_dir": ""}).build_options()
    said = {name for name, value in flatten_sections(given).items() if value is NULL}
    options = {name: value for name, value in config.build_options().items() if value != plain[name] or name in said}
    if options.get("template", "") is None:
        options["template"] = "tokenizer"
    return options


def _tokenizer_of(folder: Path) -> str:
    return str(read_manifest(folder)["options"]["tokenizer"]["fingerprint"])


def _check_built(folder: Path, asked: Mapping[str, Any]) -> None:
    """Refuse options that a build has decided otherwise; the seed is that of training, too."""
    options = read_manifest(folder)["options"]
    template = options["template"]
    built = {
        **options,
        "template": template["name"],
        "template_kwargs": template["kwargs"],
        "date": template["date"][:10],
    }
    decided = [name for name, value in asked.items() if name in built and built[name] != value and name != "seed"]
    if decided:
        raise UsageError(
            "already_built",
            f"{', '.join(decided)} cannot change: {folder} is built",
            hint="build again, or train from the data",
        )


def _given(overrides: dict[str, Any], settings: Mapping[str, Any] | Sequence[str] | None) -> dict[str, Any]:
    """Return the fields that arguments give, those of `settings` over the others."""
    if settings is None:
        return overrides
    added = {"train": dict(settings)} if isinstance(settings, Mapping) else parse_settings(settings)
    # The command line passes None for each option that is not given.
    if twice := sorted(name for name in overrides.keys() & added.keys() if overrides[name] is not None):
        raise UsageError("setting", f"{', '.join(twice)} is given twice, in settings and as an argument of its own")
    return {**overrides, **added}
