"""Shared fixtures: tokenizers, tiny models, a browser and the shared test data."""

import atexit
import fcntl
import functools
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import laws  # noqa: F401  (profiles of Hypothesis)
import pytest
import warm
from tokenizer_makers import MAKERS, REAL, tiny_bpe
from xdist.scheduler import LoadScopeScheduling

# Collection imports modules with millions of objects, which full garbage collections would traverse.
gc.disable()
# Nothing may be taken from an earlier run.
os.environ["FTDATA_CACHE"] = "off"
# Records of what was built belong to this run.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="ftdata-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
# Hundreds of processes import the same modules: without bytecode files, each would compile them again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# The workers share the warm processes.
warm.make_folder()
# Tiny models gain nothing from threads, and tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("FTDATA_SHARED", ROOT.parent / "shared"))


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


HEAVY = (
    "test_docs_pages",
    "test_run",
    "test_preference",
    "test_resume",
    "test_processes",
    "test_encode",
    "test_cli",
    "test_hostile_templates",
    "test_html_page",
    "test_evaluation",
    "test_ray",
    "test_kto",
    "test_hub",
    "test_dataset",
    "test_remote",
    "test_cache",
    "test_export",
    "test_templates",
    "test_crashes",
    "test_planted_faults",
    "test_train",
)
"""The slowest files run first, so that no worker runs one of them at the end."""


TRAINING = ("test_docs_pages", "test_examples", "test_systems")
"""Files that run in one worker, so that only this worker starts a hub and a process with the training libraries."""


class FileScheduling(LoadScopeScheduling):
    """Runs the tests of a file in one worker."""

    def _split_scope(self, nodeid):
        path = nodeid.partition("::")[0]
        return "training" if Path(path).stem in TRAINING else path


def pytest_xdist_make_scheduler(config, log):
    return FileScheduling(config, log)


def pytest_xdist_auto_num_workers():
    # Some tests wait for processes most of the time.
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: HEAVY.index(item.path.stem) if item.path.stem in HEAVY else len(HEAVY))
    for item in items:
        if item.get_closest_marker("long") or item.get_closest_marker("train"):
            item.add_marker(pytest.mark.slow)
        # Where tests must tell all, a browser that is not there is a fault.
        if item.get_closest_marker("browser") and CHROMIUM is None and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason="there is no Chromium (apt install chromium)"))
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="the shared test data is not here (FTDATA_SHARED)"))


def pytest_collection_finish():
    # Imported modules are never freed.
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared():
    return SHARED


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """Make (once) and return the folder of a tokenizer, by its name in MAKERS."""
    made = {}
    base = tmp_path_factory.getbasetemp()
    common = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "real-tokenizers"

    def get(name):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp("tokenizers") / name)
            if name in REAL:
                shutil.copytree(make_once(common, name), made[name])
            else:
                MAKERS[name](Path(made[name]))
        return made[name]

    return get


def make_once(folder, name):
    """Make a real tokenizer, which takes seconds, in the first worker that needs it; return its folder."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            MAKERS[name](folder / f"{name}.new")
            (folder / f"{name}.new").rename(folder / name)
    return folder / name


@pytest.fixture(scope="session")
def loaded_tokenizer(tokenizer_dir):
    """Load (once) and return a tokenizer: a folder is hashed in each call."""
    from ftdata.tokenizing.load import load_tokenizer

    return functools.cache(lambda name: load_tokenizer(tokenizer_dir(name)))


def tiny_model(folder, kind="llama", *, seed=0):
    """Write a small random model of a class with the vocabulary of the tokenizer into its folder."""
    import torch
    import transformers as hf

    from ftdata.tokenizing.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    common = {
        "vocab_size": tokenizer.size,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id(tokenizer.special_tokens["eos_token"]),
        "pad_token_id": tokenizer.token_to_id(tokenizer.special_tokens.get("pad_token")),
    }
    wide = {**common, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    makers = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**wide)),
        "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**wide, num_key_value_heads=1, head_dim=16)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**wide, num_key_value_heads=2, head_dim=16)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**wide, num_key_value_heads=2)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**wide, num_key_value_heads=2, head_dim=16)),
        "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **wide,
                num_key_value_heads=2,
                head_dim=16,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
            )
        ),
        "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**wide)),
        "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**wide)),
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                **common,
                hidden_size=64,
                ffn_dim=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=64,
                dropout=0.0,
            )
        ),
    }
    torch.manual_seed(seed)
    makers[kind]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A tiny Llama with the tiny byte-level tokenizer and a ChatML template."""
    return tiny_model(tiny_bpe(tmp_path_factory.mktemp("models") / "llama"))


@pytest.fixture(scope="session")
def hub_environment(tmp_path_factory):
    """The environment of a process that uses a hub on localhost; the hub serves tiny models and data sets."""
    pytest.importorskip("trl")
    from hub.small import small_hub

    variables = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    variables |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "", "COLUMNS": "200"}
    with small_hub(tmp_path_factory.mktemp("hub")) as addresses:
        yield variables | addresses


@pytest.fixture(scope="session")
def training_python():
    """Return a Python command that has imported the training libraries already."""
    pytest.importorskip("trl")
    return functools.partial(warm.python, modules=warm.TRAINING)


@pytest.fixture(scope="session")
def hub_python(hub_environment):
    """Return a Python command that has imported the training libraries already, and that uses the hub on localhost."""
    return functools.partial(warm.python, modules=warm.TRAINING, environment=hub_environment)


@pytest.fixture(scope="session")
def chromium():
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        launched = play.chromium.launch(executable_path=CHROMIUM or "chromium", args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Make (once) and return the folder of a tiny model, by its class."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tiny_model(tiny_bpe(tmp_path_factory.mktemp("models") / kind), kind)
        return made[kind]

    return get
