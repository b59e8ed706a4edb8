"""Functions that prepare data with other tools, for the comparison in `prep.py`.

    python benchmarks/speed/peers.py DIR        # installs each tool into a folder of its own in DIR

No code of the tools is patched. Each function calls the same functions as the entry point of the tool, in one process,
without truncation. The folders contain the packages that the extra `train` of ftdata does not install. `docs/speed.md`
lists the packages whose version the tool does not support.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from counting import TEMPLATE, Counted, counted, tiny_model

LONG = 1_000_000  # tokens: nothing is cut


def torchtune(data: Path, tokenizer: str) -> Counted:  # noqa: ARG001
    """Run torchtune's `chat_dataset` with its fastest tokenizer, Llama 3 in tiktoken, once over all rows."""
    import datasets
    from torchtune.datasets import chat_dataset
    from torchtune.models.llama3 import llama3_tokenizer

    datasets.disable_progress_bars()

    def load() -> Any:
        package = find_spec("llama_models")
        assert package is not None
        assert package.origin is not None
        return llama3_tokenizer(path=str(Path(package.origin).parent / "llama3" / "tokenizer.model"))

    def work(loaded: Any) -> Any:
        dataset = chat_dataset(
            loaded,
            source="json",
            data_files=str(data),
            conversation_column="messages",
            conversation_style="openai",
            cache_dir=f"{scratch}/cache",
        )
        return [dataset[at] for at in range(len(dataset))]

    def rows(done: Any) -> Any:
        for row in done:
            yield row["tokens"], [int(label) for label in row["labels"]]

    with tempfile.TemporaryDirectory() as scratch:
        return counted(load, work, rows)


def llamafactory(data: Path, tokenizer: str) -> Counted:
    """Run `get_dataset` of `llamafactory-cli train` with stage `sft` and template `chatml`, on ShareGPT rows."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    os.environ["LLAMAFACTORY_VERBOSITY"] = "WARN"
    if not transformers.__version__.startswith("5.6."):  # the newest that it was tested with; its own way past that
        os.environ["DISABLE_VERSION_CHECK"] = "1"
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args

    roles = {f"{role}_tag": role for role in ("user", "assistant", "system")}
    chats = {
        "file_name": str(data.resolve()),
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", **roles},
    }

    def load() -> Any:
        Path(scratch, "dataset_info.json").write_text(json.dumps({"chats": chats}))
        settings = {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": tokenizer,
            "dataset": "chats",
            "dataset_dir": scratch,
            "template": "chatml",
            "cutoff_len": LONG,
            "overwrite_cache": True,
            "cache_dir": f"{scratch}/cache",
            "output_dir": f"{scratch}/run",
            "report_to": "none",
            "use_cpu": True,
        }
        model, chosen, training, _, _ = get_train_args(settings)
        loaded = transformers.AutoTokenizer.from_pretrained(tokenizer, padding_side="right")
        return get_template_and_fix_tokenizer(loaded, chosen), model, chosen, training, loaded

    def work(loaded: Any) -> Any:
        template, model, chosen, training, words = loaded
        return get_dataset(template, model, chosen, training, stage="sft", tokenizer=words)["train_dataset"]

    def rows(done: Any) -> Any:
        return ((row["input_ids"], row["labels"]) for row in done)

    with tempfile.TemporaryDirectory() as scratch:
        return counted(load, work, rows)


def axolotl(data: Path, tokenizer: str) -> Counted:
    """Run the steps of `axolotl preprocess` for `type: chat_template`: tokenize, drop long rows, save to disk.

    The maps of Axolotl run in this process, which is faster than a pool of one process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(AXOLOTL_DO_NOT_TRACK="1", AXOLOTL_IS_PREPROCESS="1", HF_DATASETS_CACHE=f"{scratch}/cache")
        os.environ["AXOLOTL_DATASET_NUM_PROC"] = "1"
        import datasets
        import transformers
        from axolotl.loaders import load_tokenizer  # noqa: F401  (its command line imports it before)
        from axolotl.utils.data import prepare_datasets
        from axolotl.utils.dict import DictDefault
        from axolotl.utils.trainer import disable_datasets_caching

        from ftdata.templates import find_template

        datasets.disable_progress_bars()
        chats = {
            "path": str(data),
            "ds_type": "json",
            "type": "chat_template",
            "field_messages": "messages",
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
        }
        cfg = DictDefault(
            datasets=[chats],
            chat_template="tokenizer_default",
            sequence_len=LONG,
            dataset_num_proc=None,
            dataset_prepared_path=f"{scratch}/prepared",
            is_preprocess=True,
            val_set_size=0,
            seed=42,
        )

        def load() -> Any:
            loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
            loaded.chat_template = find_template(TEMPLATE)[1]
            return loaded

        def work(loaded: Any) -> Any:
            with disable_datasets_caching():
                return prepare_datasets(cfg, loaded)[0]

        def rows(done: Any) -> Any:
            return ((row["input_ids"], row["labels"]) for row in done)

        return counted(load, work, rows)


def unsloth(data: Path, tokenizer: str) -> Counted:
    """Run the steps of Unsloth's notebooks: text, `SFTTrainer` up to the first step, `train_on_responses_only`."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(UNSLOTH_DISABLE_STATISTICS="1", UNSLOTH_COMPILE_LOCATION=f"{scratch}/compiled")
        os.environ["UNSLOTH_ALLOW_CPU"] = "1"  # its own way to be imported without a GPU
        import datasets
        import transformers
        from unsloth.chat_templates import train_on_responses_only
        from unsloth.models.rl import patch_trl_rl_trainers

        from ftdata.templates import find_template

        patch_trl_rl_trainers()  # as `import unsloth` does where there is a GPU: its own trainer in TRL's place
        from trl import SFTConfig, SFTTrainer

        datasets.disable_caching()
        datasets.disable_progress_bars()

        def load() -> Any:
            loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
            loaded.chat_template = find_template(TEMPLATE)[1]
            return loaded, tiny_model(len(loaded))

        def work(loaded: Any) -> Any:
            words, model = loaded

            def text(batch: Any) -> Any:
                return {"text": [words.apply_chat_template(chat, tokenize=False) for chat in batch["messages"]]}

            chats = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=f"{scratch}/cache")
            settings = SFTConfig(
                output_dir=f"{scratch}/run",
                dataset_text_field="text",
                dataset_num_proc=1,
                max_length=LONG,
                report_to="none",
                use_cpu=True,
                bf16=False,
            )
            trainer = SFTTrainer(
                model=model, processing_class=words, train_dataset=chats.map(text, batched=True), args=settings
            )
            return train_on_responses_only(
                trainer,
                instruction_part="<|im_start|>user\n",
                response_part="<|im_start|>assistant\n",
                num_proc=1,
            )

        def rows(done: Any) -> Any:
            return ((row["input_ids"], row["labels"]) for row in done.train_dataset)

        return counted(load, work, rows)


def tinker_cookbook(data: Path, tokenizer: str) -> Counted:
    """Run `conversation_to_datum` for every row, like the recipe `sl_loop`, without thinking blocks."""
    import datasets
    from tinker_cookbook.renderers import get_renderer
    from tinker_cookbook.supervised.data import conversation_to_datum
    from tinker_cookbook.tokenizer_utils import get_tokenizer

    datasets.disable_progress_bars()

    def load() -> Any:
        return get_renderer("qwen3_instruct", get_tokenizer(tokenizer))

    def work(loaded: Any) -> Any:
        chats = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=f"{scratch}/cache")
        return [conversation_to_datum(row["messages"], loaded, max_length=None) for row in chats]

    with tempfile.TemporaryDirectory() as scratch:
        return counted(load, work, _datums)


def _datums(done: Any) -> Any:
    """Return the ids and labels of Tinker's inputs and targets, which are shifted by one token."""
    for datum in done:
        targets, weights = (datum.loss_fn_inputs[name].data for name in ("target_tokens", "weights"))
        trained = (target if weight else -100 for target, weight in zip(targets, weights, strict=True))
        yield [datum.model_input.to_ints()[0], *targets], [-100, *trained]


def renderers(data: Path, tokenizer: str) -> Counted:
    """Run `build_training_sample` for every row, with the renderer for Qwen3."""
    import datasets
    import transformers
    from renderers import Qwen3RendererConfig, build_training_sample, create_renderer

    datasets.disable_progress_bars()

    def load() -> Any:
        return create_renderer(transformers.AutoTokenizer.from_pretrained(tokenizer), Qwen3RendererConfig())

    def work(loaded: Any) -> Any:
        chats = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=f"{scratch}/cache")
        return [build_training_sample(loaded, row["messages"], role_to_mask=_assistant) for row in chats]

    def rows(done: Any) -> Any:
        for sample in done:
            ids, mask = sample.token_ids, sample.loss_mask
            yield ids, [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]

    with tempfile.TemporaryDirectory() as scratch:
        return counted(load, work, rows)


def _assistant(message: Any) -> bool:
    return bool(message["role"] == "assistant")


_OMEGACONF = ("omegaconf", "antlr4-python3-runtime==4.9.3")
_NETWORK = ("httpx", "httpcore", "distro", "sniffio")

PEERS: dict[str, tuple[Callable[[Path, str], Counted], tuple[str, ...]]] = {
    "torchtune": (
        torchtune,
        (
            "torchtune==0.6.1",
            "torchao==0.14.1",
            "torchdata==0.11.0",
            "llama-models==0.3.0",
            "tiktoken==0.14.0",
            "sentencepiece",
            "blobfile",
            "pycryptodomex",
            *_OMEGACONF,
        ),
    ),
    "llamafactory": (
        llamafactory,
        ("llamafactory==0.9.5", "sentencepiece", "protobuf", "av", "torchaudio==2.11.0", *_OMEGACONF),
    ),
    "axolotl": (
        axolotl,
        (
            "axolotl==0.19.0",
            "addict==2.4.0",
            "posthog",
            "backoff",
            "distro",
            "colorama",
            "fire",
            "termcolor",
            "art",
            "numba",
            "llvmlite",
        ),
    ),
    "unsloth": (unsloth, ("unsloth==2026.10.9", "unsloth_zoo==2026.10.9")),
    "tinker-cookbook": (
        tinker_cookbook,
        (
            "tinker-cookbook==0.6.1",
            "tinker==0.38.0",
            "chz",
            "blobfile",
            "pycryptodomex",
            "cloudpickle",
            "termcolor",
            "tml-renderers",
            "pyrage",
            "protobuf",
            *_NETWORK,
        ),
    ),
    "renderers": (
        renderers,
        ("renderers==0.1.12", "openai", "openai-harmony", "prime-pydantic-config", "jiter", *_NETWORK),
    ),
}
"""Tool -> what is timed, and what it needs installed."""


def main() -> None:
    """Install each tool into a folder with the name of the tool."""
    for name, (_, needed) in PEERS.items():
        target = Path(sys.argv[1]) / name
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(target)]
        subprocess.run([*command, *needed], check=True)  # noqa: S603
        # The wheels of torchaudio are for GPUs; without their library it is as built without extensions.
        shutil.rmtree(target / "torchaudio" / "lib", ignore_errors=True)


if __name__ == "__main__":
    main()
