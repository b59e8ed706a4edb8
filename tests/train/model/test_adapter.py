"""Fields of LoraConfig, BitsAndBytesConfig and SFTConfig: passed through, or refused before data is read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftdata.config import load_config, make_config, to_yaml
from ftdata.errors import UsageError

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import peft  # noqa: E402
import torch  # noqa: E402
import transformers as hf  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from trl import SFTConfig  # noqa: E402

from ftdata.train import compare, dry_run, run  # noqa: E402
from ftdata.train.model.adapter import FIXED, check_lora, make_lora_config  # noqa: E402
from ftdata.train.model.config_fields import fields_of  # noqa: E402
from ftdata.train.model.load import count_parameters, load_model  # noqa: E402
from ftdata.train.model.quantization import bytes_per_weight, quantization_config, quantization_name  # noqa: E402
from ftdata.train.runs.trainer_arguments import check_settings  # noqa: E402

QUICK = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
REQUIRED = {"data": "d.json", "model": "m", "output_dir": "o"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": f"It is {n}."}) + "\n" for n in range(6)))
    return str(path)


# LoRA


def test_every_field_of_lora_config_is_passed_through(llama):
    values = {
        "use_dora": True, "use_rslora": True, "modules_to_save": ["lm_head"], "init_lora_weights": "gaussian", "bias": "lora_only",
        "layers_to_transform": [1], "layers_pattern": "layers", "exclude_modules": ["k_proj"], "rank_pattern": {"q_proj": 2},
        "runtime_config": {"ephemeral_gpu_offload": True}, "fan_in_fan_out": False, "trainable_token_indices": [1, 2],
    }  # fmt: skip
    lora = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"], **values}
    config = make_config({**REQUIRED, "lora": lora})
    check_lora(config)
    made = make_lora_config(config, hf.AutoModelForCausalLM.from_pretrained(llama), grows=False)
    assert (made.r, made.lora_alpha, made.lora_dropout, made.target_modules) == (4, 8, 0.1, {"q_proj", "v_proj"})
    for name, value in values.items():
        if name not in ("runtime_config", "exclude_modules"):
            assert getattr(made, name) == value, name
    assert made.exclude_modules == {"k_proj"}
    assert made.runtime_config == peft.LoraRuntimeConfig(ephemeral_gpu_offload=True)


def test_lora_fields_have_short_and_original_names(tmp_path):
    short, long = (
        {**REQUIRED, "lora": {"r": 4, a: 8, d: 0.5}} for a, d in (("alpha", "dropout"), ("lora_alpha", "lora_dropout"))
    )
    assert make_config(short) == make_config(long)
    assert make_config(short, lora={"lora_alpha": 9}).lora.alpha == 9
    with pytest.raises(UsageError, match="set twice"):
        make_config({**REQUIRED, "lora": {"alpha": 1, "lora_alpha": 2}})
    config = make_config({**REQUIRED, "lora": {"use_dora": True}}, lora={"bias": "all"})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml") == config
    assert config.lora.extra_fields == {"use_dora": True, "bias": "all"}


WRONG_LORA = {
    "rank": (3, "LoraConfig has no field 'rank'"),
    "use_dorra": (True, "did you mean 'use_dora'"),
    "lora_alpa": (8, "did you mean 'lora_alpha'"),
    "use_dora": ("maybe", "use_dora is 'maybe', expected true or false"),
    "use_rslora": (1, "expected true or false"),
    "fan_in_fan_out": ("yes", "expected true or false"),
    "bias": ("some", "expected one of none, all, lora_only"),
    "modules_to_save": ("lm_head", "expected a list of strings"),
    "layers_to_transform": ("1", "expected a list of whole numbers or a whole number"),
    "rank_pattern": ([1], "expected a mapping"),
    "init_lora_weights": ("guassian", "init_lora_weights is 'guassian'"),
    "target_modules": ([3], "target_modules"),
    "r": ("8", "lora.r"),
    "eva_config": ({"rhoo": 1}, "fields of EvaConfig"),
    "layer_replication": ([[1]], "layer_replication"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_LORA)
def test_unknown_lora_fields_are_refused(name):
    value, says = WRONG_LORA[name]
    with pytest.raises(UsageError, match=says) as refused:
        check_lora(make_config({**REQUIRED, "lora": {name: value}}))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        *(({name: "x"}, "cannot be set") for name in FIXED if name != "inference_mode"),
        ({"inference_mode": True}, "the adapter is always trained"),
        ({"layers_to_transform": [0]}, "cannot be used when `target_modules` is a str"),
        ({"loftq_config": {"loftq_bits": 4}}, "ignored"),
        ({"init_lora_weights": "eva"}, "needs a pass over the data"),
        ({"init_lora_weights": "pissa_niter_4"}, "different random values"),
    ],
)
def test_unsupported_lora_fields_are_refused(lora, says):
    with pytest.raises(UsageError, match=says):
        check_lora(make_config({**REQUIRED, "lora": lora}))
    with pytest.raises(UsageError, match="not quantized"):
        check_lora(make_config({**REQUIRED, "lora": {"init_lora_weights": "pissa"}, "quantization": "nf4"}))


MISSING = {
    "lora.target_modules=nope": "module that matches 'nope'",
    "lora.target_modules=[q_proj, q_prj]": "no module 'q_prj'. Fix: did you mean 'q_proj'",
    "lora.target_modules=[": "not valid|while parsing",
    "lora.target_modules='['": "not a valid regular expression",
    "lora.modules_to_save=[lm_hed]": "lora.modules_to_save: .*no module 'lm_hed'. Fix: did you mean 'lm_head'",
    "lora.exclude_modules=[nope]": "lora.exclude_modules",
    "lora.target_parameters=[nope]": "lora.target_parameters",
    "lora.target_modules=[act_fn]": "cannot be added",
    "lora.target_modules=q_proj": r"pass a list: \[q_proj\]",
    "lora.arrow_config={}": "cannot be added",
    "quantization={load_in_4bit: true, llm_int8_skip_modules: [q_prj]}": "no module 'q_prj'. Fix: did you mean 'q_proj'",
}


@pytest.mark.parametrize("setting", MISSING)
def test_missing_modules_are_refused_before_reading_data(llama, tmp_path, setting):
    for call in (run, dry_run):
        with pytest.raises(UsageError, match=MISSING[setting]):
            call("/nowhere/data.jsonl", model=llama, output_dir=tmp_path / "run", settings=[setting])
    assert not (tmp_path / "run").exists()


def test_missing_layers_are_refused(llama, tmp_path):
    lora = {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}
    with pytest.raises(UsageError, match="layers_to_transform: .*no layer 2. Fix: expected 0 to 1"):
        run("/nowhere/data.jsonl", model=llama, output_dir=tmp_path / "run", lora=lora)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"rank_pattern": {"q_prj": 4}}, "rank_pattern: .*no module 'q_prj'.*did you mean 'q_proj'"),
        ({"alpha_pattern": {"nomod": 4}}, "alpha_pattern: .*no module 'nomod'"),
        ({"exclude_modules": "foo"}, "exclude_modules: .*no module that matches 'foo'"),
        ({"trainable_token_indices": [10_000_000]}, "trainable_token_indices: .*no token 10000000. Fix: expected 0 to"),
        ({"trainable_token_indices": [-5]}, "no token -5"),
        ({"layer_replication": [[0, 99]]}, "cannot be added"),
    ],
)
def test_lora_settings_that_peft_would_ignore_are_refused(llama, tmp_path, lora, says):
    lora = {"target_modules": ["q_proj", "v_proj"], **lora}
    with pytest.raises(UsageError, match=says):
        run("/nowhere/data.jsonl", model=llama, output_dir=tmp_path / "run", lora=lora)


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param({"use_dora": True}, id="dora", marks=pytest.mark.long),
        pytest.param({"use_rslora": True, "bias": "all"}, id="rslora and bias"),
        pytest.param({"modules_to_save": ["lm_head"]}, id="a module whole", marks=pytest.mark.long),
        pytest.param({"init_lora_weights": "pissa"}, id="pissa", marks=pytest.mark.long),
    ],
)
def test_other_adapters_train_and_can_be_reloaded(llama, data, tmp_path, lora):
    found, _ = dry_run(data, model=llama, output_dir=tmp_path / "run", lora={"r": 2, **lora})
    folder = run(data, model=llama, output_dir=tmp_path / "run", lora={"r": 2, **lora}, settings=QUICK)
    saved = load_file(folder / "model" / "adapter_model.safetensors")
    count = sum(weight.numel() for name, weight in saved.items() if not name.endswith(".bias"))
    assert count == found.trainable
    scores = compare(folder, n=1, max_new_tokens=1)
    assert scores.tuned.perplexity < scores.base.perplexity
    base = compare(run(data, model=llama, output_dir=tmp_path / "full", settings=QUICK), n=1, max_new_tokens=1).base
    assert scores.base == base
    about = json.loads((folder / "run.json").read_text())
    assert about["setup"]["lora"] == {"r": 2, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear", **lora}


def test_saved_tied_embedding_stays_tied(llama):
    config = make_config({**REQUIRED, "lora": {"modules_to_save": ["embed_tokens"]}})
    for tied in (True, False):
        model = hf.AutoModelForCausalLM.from_pretrained(llama, tie_word_embeddings=tied)
        assert make_lora_config(config, model, grows=False).ensure_weight_tying is tied


# Quantization


@pytest.mark.parametrize(
    ("chosen", "kind"),
    [
        ("nf4", "nf4"),
        ("fp4", "fp4"),
        ("int8", "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_skip_modules": ["q_proj"]}, "nf4"),
        ({"load_in_8bit": True, "llm_int8_threshold": 5}, "int8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "float32"}, "fp4"),
    ],
)
def test_base_model_is_quantized_as_configured(llama, chosen, kind):
    import bitsandbytes as bnb

    model = load_model(llama, chosen)
    wanted = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
    layers = {name: module for name, module in model.named_modules() if isinstance(module, wanted)}
    skipped = 2 if isinstance(chosen, dict) and "llm_int8_skip_modules" in chosen else 0
    assert len(layers) == 14 - skipped
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    if kind != "int8":
        assert {module.weight.quant_type for module in layers.values()} == {kind}
    assert quantization_name(chosen) == kind
    assert count_parameters(model)[1] == count_parameters(load_model(llama))[1]


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param("fp4", marks=pytest.mark.long),
        "int8",
        pytest.param({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_quantized_run_is_estimated_trained_and_evaluated(llama, data, tmp_path, chosen):
    given = {"model": llama, "output_dir": tmp_path / "run", "quantization": chosen}
    found, _ = dry_run(data, **given)
    footprint = load_model(llama, chosen).get_memory_footprint()
    assert abs(found.weights - 4 * found.trainable - footprint) < 0.05 * footprint
    folder = run(data, settings=QUICK, **given)
    scores = compare(folder, n=1, max_new_tokens=1)
    assert scores.tuned.perplexity < scores.base.perplexity
    assert load_config(folder / "config.yaml").quantization == chosen


WRONG_QUANTIZATION = [
    ("int3", "unknown_quantization.*int3"),
    ({"load_in_4bits": True}, "did you mean 'load_in_4bit'"),
    ({"load_in_4bit": "maybe"}, "quantization.load_in_4bit is 'maybe', expected true or false"),
    ({"load_in_4bit": True, "load_in_8bit": True}, "sets both"),
    ({"bnb_4bit_quant_type": "nf4"}, "sets neither"),
    ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "expected one of nf4, fp4"),
    ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "float17"}, "expected one of float32, float16, bfloat16"),
    ({"load_in_8bit": True, "llm_int8_threshold": "6"}, "expected a number"),
    ({"load_in_8bit": True, "llm_int8_skip_modules": "lm_head"}, "expected a list of strings"),
]


@pytest.mark.parametrize(("chosen", "says"), WRONG_QUANTIZATION)
def test_invalid_quantization_is_refused_before_reading_data(llama, tmp_path, chosen, says):
    for call in (run, dry_run):
        with pytest.raises(UsageError, match=says):
            call("/nowhere/data.jsonl", model=llama, output_dir=tmp_path / "run", quantization=chosen)
    with pytest.raises(UsageError, match="quantization"):
        make_config({**REQUIRED, "quantization": 4})


def test_quantization_names_set_the_expected_fields():
    assert quantization_config("nf4", torch.float32).bnb_4bit_use_double_quant
    assert quantization_config(None, torch.float32) is None
    assert bytes_per_weight("nf4") < bytes_per_weight({"load_in_4bit": True}) < bytes_per_weight("int8") == 1


# SFTConfig


SWITCHES = [name for name, field in fields_of(SFTConfig).items() if field.expected == "true or false"]


def test_boolean_settings_accept_only_booleans():
    assert len(SWITCHES) > 40
    from ftdata.train.runs.trainer_arguments import FIXED as HANDED_OVER

    for name in set(SWITCHES) - HANDED_OVER.keys():
        for wrong in ("maybe", "yes", "no", "on", "true", "", 1, 0, 1.0, [], {}):
            with pytest.raises(UsageError, match=f"train.{name} is .*, expected true or false"):
                check_settings({name: wrong})
        check_settings({name: True})
        check_settings({name: False})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lr_scheduler_kwargs": [1]}, "expected a mapping or a string"),
        ({"label_names": "labels"}, "expected a list of strings"),
        ({"run_name": 3}, "expected a string"),
        ({"report_to": [3]}, "expected a string or a list of strings"),
        ({"liger_kernel_config": {"rope": "maybe"}}, "expected a mapping"),
        ({"hub_token": ["hf_secret"]}, "train.hub_token is \\['?\\[redacted-by-ftdata\\]'?\\], expected a string"),
    ],
)
def test_settings_of_wrong_types_are_refused(settings, says):
    with pytest.raises(UsageError, match=says):
        check_settings(settings)


def test_command_line_reports_invalid_settings_in_one_line(training_python, llama, data, tmp_path):
    command = training_python("-m", "ftdata", "train", data, "-m", llama, "-o", tmp_path / "run", "--dry-run")
    for setting, says in (("bf16=maybe", "expected true or false"), ("lora.use_dorra=true", "did you mean 'use_dora'"),
                          ("quantization.load_in_9bit=true", "has no field 'load_in_9bit'")):  # fmt: skip
        done = subprocess.run([*command, "--set", setting], check=False, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert says in done.stderr
        assert "Traceback" not in done.stderr


def test_package_import_loads_no_training_library():
    code = "import sys, ftdata, ftdata.cli, ftdata.config, ftdata.redaction, ftdata.train\n"
    code += "assert not {'torch', 'transformers', 'trl', 'peft', 'bitsandbytes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"optim": "adamw_tor"}, "adamw_tor"),
        ({"lr_scheduler_type": "cosin"}, "cosin"),
        ({"save_strategy": "sometimes"}, "sometimes"),
        ({"eval_strategy": "stepz"}, "stepz"),
        ({"report_to": "wandbb"}, "wandbb"),
    ],
)
def test_unknown_trainer_values_are_refused_before_reading_data(llama, tmp_path, settings, says):
    with pytest.raises(UsageError, match=says):
        run("/nowhere/data.jsonl", model=llama, output_dir=tmp_path / "run", settings=settings)
