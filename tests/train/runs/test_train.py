"""Training with SFTTrainer: a tiny Llama, NF4 on the CPU, checkpoints, resuming and reloading."""

import json
import math
import shutil
from pathlib import Path

import pytest
from cases import long

from ftdata import build_sft_dataset
from ftdata.errors import InputRefused, InternalError, UsageError

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from ftdata.config import make_config, parse_settings  # noqa: E402
from ftdata.train import compare, dry_run, run  # noqa: E402
from ftdata.train.model.isolation_probe import measure_leak  # noqa: E402
from ftdata.train.model.load import count_parameters, load_model  # noqa: E402
from ftdata.train.runs.train_model import make_trainer  # noqa: E402
from ftdata.train.runs.trainer_arguments import check_first_batch  # noqa: E402

ROWS = [
    {"question": f"What is {a}?", "answer": answer}
    for a, answer in zip("abcdefgh", ["one", "two", "three", "four", "five", "six", "seven", "eight"], strict=True)
]
QUICK = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_total_limit": 10,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture(scope="module")
def qlora_run(llama, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "qlora"
    run(
        data,
        model=llama,
        output_dir=folder,
        quantization="nf4",
        packing="bfd",
        max_length=128,
        test_size=2,
        settings=QUICK,
    )
    return folder


def losses(folder):
    return json.loads((folder / "run.json").read_text())["loss"]


def test_qlora_run_learns_and_writes_all_files(qlora_run, llama):
    assert losses(qlora_run)[-1] < losses(qlora_run)[0]
    about = json.loads((qlora_run / "run.json").read_text())
    assert about["finished"]
    assert about["test_loss"] > 0
    for name in (
        "loss.png",
        "loss.svg",
        "model/adapter_model.safetensors",
        "model/tokenizer.json",
        "model/generation_config.json",
        "data/manifest.json",
    ):
        assert (qlora_run / name).stat().st_size > 0, name
    assert json.loads((qlora_run / "model" / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_base_model_is_loaded_in_four_bits(llama):
    import bitsandbytes

    model = load_model(llama, "nf4")
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    state = layers[0].weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    assert count_parameters(model)[1] == count_parameters(load_model(llama, None))[1]


def test_resume_is_exact(qlora_run, llama, data, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(qlora_run, again)
    checkpoints = sorted(again.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for later in checkpoints[2:]:
        shutil.rmtree(later)
    run(again / "data", model=llama, output_dir=again, quantization="nf4", settings=QUICK, resume=True)
    assert losses(again) == losses(qlora_run)


def test_saved_adapter_can_be_evaluated(qlora_run, data):
    held_out = compare(qlora_run, max_new_tokens=4)
    assert held_out.data_name.startswith("the test split")
    assert len(held_out.rows) == 2
    report = compare(qlora_run, data, n=4, max_new_tokens=4)
    assert [row.expected for row in report.rows] == ["one", "two", "three", "four"]
    assert any(row.base != row.tuned for row in report.rows)
    assert report.as_dict()["rows"][0]["prompt"] == "user\nWhat is a?\nassistant"


def test_evaluation_prompts_equal_training_prompts(qlora_run, data):
    from ftdata.build.dataset import load_build
    from ftdata.train.inference.prompts import encode_messages, encode_rows, read_documents, split_last_turn
    from ftdata.train.inference.run_dir import open_run

    recipe = open_run(qlora_run).recipe
    rows = [split_last_turn(text.ids, text.labels, {2}) for text in encode_rows(data, recipe)]
    texts = (text for split in load_build(qlora_run / "data").values() for text in read_documents(split))
    assert all(split_last_turn(text.ids, text.labels, {2}) in rows for text in texts)
    asked = [encode_messages([{"role": "user", "content": row["question"]}], recipe) for row in ROWS]
    assert asked == [prompt for prompt, _ in rows]


def test_typed_control_tokens_in_prompts_are_text(llama):
    from ftdata.train.inference.prompts import encode_rows, rebuild_recipe

    options = {
        "template": {"name": "tokenizer", "date": None, "kwargs": {}},
        "schema": "auto",
        "columns": None,
        "turns": "auto",
        "control_tokens": "escape",
    }
    ((ids, *_),) = encode_rows([{"question": "a<|im_end|>b", "answer": "c"}], rebuild_recipe(llama, options))
    assert ids.count(2) == 2


def test_run_directory_can_be_moved(qlora_run, tmp_path, monkeypatch):
    shutil.copytree(qlora_run, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert compare("moved", n=1, max_new_tokens=2).rows


@pytest.mark.parametrize("options", [{"lora": {"r": 4}}, long({})], ids=["lora", "full"])
def test_unquantized_run_learns(llama, data, tmp_path, options):
    run(
        data,
        model=llama,
        output_dir=tmp_path / "run",
        settings={**QUICK, "num_train_epochs": 2, "save_strategy": "no"},
        **options,
    )
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    weights = "adapter_model.safetensors" if options else "model.safetensors"
    assert (tmp_path / "run" / "model" / weights).is_file()
    if not options:
        assert compare(tmp_path / "run", n=2, max_new_tokens=2).rows


def trainer_for(llama, tmp_path, built, *, isolated=True, **train):
    config = make_config(
        {"data": "d", "task": "sft", "model": llama, "output_dir": str(tmp_path), "train": {**QUICK, **train}}
    )
    return make_trainer(config, load_model(llama, None), built, isolated=isolated)


def test_first_batch_equals_the_build_and_a_wrong_batch_is_an_error(llama, tmp_path):
    built = build_sft_dataset(ROWS, llama, packing="bfd", max_length=128)
    trainer = trainer_for(llama, tmp_path, built)
    before = torch.get_rng_state()
    check_first_batch(trainer, padding_free=True)
    assert torch.equal(torch.get_rng_state(), before)
    right = trainer.data_collator

    def untrained(rows):
        batch = right(rows)
        batch["labels"][0, -3:] = -100
        return batch

    def joined(rows):
        batch = right(rows)
        batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
        return batch

    for wrong in (untrained, joined):
        trainer.data_collator = wrong
        with pytest.raises(InternalError, match="first batch"):
            check_first_batch(trainer, padding_free=True)


def test_padded_rows_have_the_same_labels(llama, tmp_path):
    built = build_sft_dataset(ROWS, llama)
    joined, padded = trainer_for(llama, tmp_path, built), trainer_for(llama, tmp_path, built, isolated=False)
    check_first_batch(padded, padding_free=False)
    batch = next(iter(padded.get_train_dataloader()))
    assert batch["attention_mask"].shape == batch["labels"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    joined.eval_dataset, padded.eval_dataset = joined.train_dataset, padded.train_dataset
    assert math.isclose(joined.evaluate()["eval_loss"], padded.evaluate()["eval_loss"], rel_tol=1e-5)


def test_packed_and_unpacked_losses_are_equal(llama, tmp_path):
    """P4, P9: packing does not change the predictions for a document."""
    packed, alone = build_sft_dataset(ROWS, llama, packing="bfd", max_length=128), build_sft_dataset(ROWS, llama)
    assert len(packed["train"]) < len(alone["train"])
    found = []
    for built in (packed, alone):
        trainer = trainer_for(llama, tmp_path, built)
        trainer.eval_dataset = trainer.train_dataset
        found.append(trainer.evaluate()["eval_loss"])
    assert math.isclose(*found, rel_tol=1e-4)
    trainer = trainer_for(llama, tmp_path, packed)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"] == 0).nonzero()[:, 1]
    assert (batch["labels"][0, starts] == -100).all()


def test_isolation_probe_detects_leaking_models(tmp_path, llama, tokenizer_dir):
    from conftest import tiny_model
    from tokenizer_makers import tiny_bpe

    assert measure_leak(AutoModelForCausalLM.from_pretrained(llama)) < 1e-5
    opt = tiny_model(tiny_bpe(tmp_path / "opt", None, bos="</s>", eos="</s>"), "opt")
    assert measure_leak(AutoModelForCausalLM.from_pretrained(opt)) > 1e-4
    with pytest.raises(InputRefused, match="attend to each other"):
        run(
            write(tmp_path),
            model=opt,
            output_dir=tmp_path / "run",
            template="question_answer",
            packing="bfd",
            max_length=128,
        )


def write(folder):
    path = Path(folder) / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"packing": True}, "packing is done in the build"),
        ({"max_length": 3}, "length is set in the build"),
        ({"assistant_only_loss": True}, "the mask is set"),
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        (["learning_rate"], "expected name=value"),
        ({"lr_scheduler_type": "nonsense"}, "SFTConfig rejects"),
        ({"learning_rate": "abc"}, "expected a number"),
        ({"bf16": "maybe"}, "expected true or false"),
        (["lora.rank=3"], "no field 'rank'"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"eval_strategy": "steps"}, "there is no test split"),
        ({"group_by_length": True}, "no field 'group_by_length'"),
        ({"resume_from_checkpoint": "/nowhere"}, "--resume"),
        (["x=[1"], "--set x"),
        ({"per_device_train_batch_size": None}, "expected a number"),
        ({"per_device_train_batch_size": True}, "expected a number"),
        ({"num_train_epochs": None}, "expected a number"),
        ({"max_steps": 1.5}, "expected a whole number"),
        ({"max_steps": 2.0}, "expected a whole number"),
        ({"max_steps": 0}, "0 steps"),
        ({"learning_rate": -1}, "at least 0"),
        ({"learning_rate": float("nan")}, "expected a number"),
        ({"seed": -1}, "expected 0 to"),
        ({"seed": 1.5}, "expected a whole number"),
        ({"num_train_epochs": 0}, "0 steps"),
        ({"metric_for_best_model": "foo"}, "metric_for_best_model"),
        ({"push_to_hub": True}, "hf upload"),
        ({"use_liger_kernel": True}, "TRL's fused head"),
        ({"accelerator_config": {"split_batches": True}}, "none is lost or repeated"),
        ({"report_to": "nonsense"}, "SFTConfig rejects"),
        ({"log_level": "nope"}, "SFTConfig rejects"),
        (["lora=null", "lora.r=8"], "sets both"),
        (["train=5", "learning_rate=1"], "sets both"),
        (["lora.target_modules=nope"], "no module that matches 'nope'"),
        (["attn_implementation=foo"], "cannot be created"),
    ],
)
def test_settings_that_would_undo_the_build_are_refused(llama, data, tmp_path, settings, says):
    for call in (run, dry_run):
        with pytest.raises(UsageError, match=says):
            call(data, model=llama, output_dir=tmp_path / "run", settings=settings)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    "settings", [{"adam_beta1": 2}, {"optim": "lomo"}, {"lr_scheduler_type": "cosine_with_min_lr"}]
)
def test_values_that_only_the_trainer_rejects_are_refused(llama, data, tmp_path, settings):
    with pytest.raises(UsageError, match="train_setting"):
        run(data, model=llama, output_dir=tmp_path / "run", settings={"max_steps": 1, **settings})


def test_settings_can_be_reset_to_null(llama, data, tmp_path):
    from ftdata.train import _resolve

    path = tmp_path / "run.yaml"
    path.write_text(f"data: {data}\nmodel: other\noutput_dir: out\nlora: {{r: 4}}\npack: bfd\nmax_length: 64\n")
    settings = ["lora=null", "pack=null", "length.max_length=null", f"model={llama}", "output_dir=there"]
    config, _ = _resolve(path, None, None, parse_settings(settings))
    assert (config.lora, config.packing, config.max_length, config.model) == (None, None, None, llama)
    assert config.output_dir == "there"


def test_invalid_runs_are_refused_before_training(llama, data, qlora_run, tmp_path, tokenizer_dir):
    with pytest.raises(UsageError, match="already contains a run"):
        run(qlora_run / "data", model=llama, output_dir=qlora_run)
    with pytest.raises(UsageError, match="contains no run to resume"):
        run(qlora_run / "data", model=llama, output_dir=tmp_path / "empty", resume=True)
    from conftest import tiny_model
    from tokenizer_makers import tiny_bpe

    foreign = tiny_model(tiny_bpe(tmp_path / "foreign", eos="<|endoftext|>"))
    with pytest.raises(InputRefused, match="differs from the tokenizer of"):
        run(qlora_run / "data", model=foreign, output_dir=tmp_path / "other")
    with pytest.raises(UsageError, match="cannot change"):
        run(qlora_run / "data", model=llama, output_dir=tmp_path / "other", max_length=3)
    with pytest.raises(UsageError, match="unknown_quantization"):
        run(data, model=llama, output_dir=tmp_path / "other", quantization="int3")
    shutil.copytree(qlora_run / "data", tmp_path / "damaged")
    (tmp_path / "damaged" / "train" / "state.json").write_text("{}")
    with pytest.raises(InputRefused, match="missing or damaged files"):
        run(tmp_path / "damaged", model=llama, output_dir=tmp_path / "other")
    build_sft_dataset(ROWS[:3], llama, output_dir=tmp_path / "new")
    shutil.copytree(qlora_run, tmp_path / "moved")
    with pytest.raises(InputRefused, match="trained on build"):
        run(
            tmp_path / "new",
            model=llama,
            output_dir=tmp_path / "moved",
            resume=True,
            quantization="nf4",
            settings=QUICK,
        )


def test_stop_token_is_a_control_token_or_eos(llama, data, tmp_path):
    """Answers that end in plain text must not make that text a stop token of the saved model."""
    plain = "{{ question }}{% generation %} {{ answer }}.{% endgeneration %}"
    folder = run(
        data, model=llama, output_dir=tmp_path / "run", template=plain, lora={"r": 2}, settings={"max_steps": 1}
    )
    assert json.loads((folder / "model" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_saved_tokenizer_has_the_training_template(llama, data, tmp_path):
    other = (
        "{% for m in messages %}<|im_start|>{{ m.role | upper }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    )
    folder = run(
        data, model=llama, output_dir=tmp_path / "run", template=other, lora={"r": 2}, settings={"max_steps": 1}
    )
    assert (folder / "model" / "chat_template.jinja").read_text() == other


def test_adapter_as_base_model_is_refused(qlora_run, data, tmp_path):
    with pytest.raises(InputRefused, match="is an adapter"):
        run(data, model=str(qlora_run / "model"), output_dir=tmp_path / "run")


def test_resume_with_other_options_is_refused(qlora_run, llama, tmp_path):
    shutil.copytree(qlora_run, tmp_path / "again")
    for changed in ({"quantization": None}, {"lora": {"r": 4}}, {"settings": {**QUICK, "learning_rate": 1}}):
        options = {"quantization": "nf4", "settings": QUICK, **changed}
        with pytest.raises(InputRefused, match="has different settings"):
            run(tmp_path / "again" / "data", model=llama, output_dir=tmp_path / "again", resume=True, **options)


def test_refused_run_leaves_the_existing_run(qlora_run, llama, tmp_path):
    shutil.copytree(qlora_run, tmp_path / "again")
    before = (tmp_path / "again" / "data" / "manifest.json").read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "x", "answer": "y"}\n')
    common = {"model": llama, "output_dir": tmp_path / "again", "settings": QUICK, "quantization": "nf4"}
    with pytest.raises(UsageError, match="already contains a run"):
        run(str(other), **common)
    with pytest.raises(InputRefused, match="trained on build"):
        run(str(other), resume=True, **common)
    assert (tmp_path / "again" / "data" / "manifest.json").read_bytes() == before
    assert not (tmp_path / "again" / "data.resumed").exists()
    assert compare(tmp_path / "again", n=1, max_new_tokens=1).rows


def test_incomplete_checkpoint_is_skipped(qlora_run, llama, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(qlora_run, again)
    last = max(again.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (last / "optimizer.pt").unlink()
    run(again / "data", model=llama, output_dir=again, quantization="nf4", settings=QUICK, resume=True)
    assert losses(again) == losses(qlora_run)


def with_token(llama, folder, token, **config):
    """Add a token without an embedding in the model to its tokenizer."""
    from tokenizers import Tokenizer

    shutil.copytree(llama, folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([token])
    backend.save(str(folder / "tokenizer.json"))
    known = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**known, **config}))
    return str(folder)


def test_pad_token_without_an_embedding_is_replaced(llama, tmp_path):
    model = with_token(llama, tmp_path / "model", "[PAD]", pad_token="[PAD]")
    folder = run(write(tmp_path), model=model, output_dir=tmp_path / "run", settings={"max_steps": 1})
    saved = json.loads((folder / "model" / "generation_config.json").read_text())
    rows = AutoModelForCausalLM.from_pretrained(llama).get_input_embeddings().weight.shape[0]
    assert saved["pad_token_id"] == AutoModelForCausalLM.from_pretrained(llama).config.eos_token_id
    assert AutoModelForCausalLM.from_pretrained(folder / "model").get_input_embeddings().weight.shape[0] == rows


@pytest.mark.parametrize(
    "options",
    [{}, {"lora": {"r": 4}}, {"quantization": "nf4"}],
    ids=["full", "lora", "nf4"],
)
@pytest.mark.parametrize("tied", [True, long(False)])
def test_new_tokens_get_embeddings_and_are_trained(llama, tmp_path, options, tied):
    model = with_token(llama, tmp_path / "model", "[NEW]")
    base = AutoModelForCausalLM.from_pretrained(llama, tie_word_embeddings=tied)
    base.save_pretrained(model)
    path = tmp_path / "new.jsonl"
    path.write_text('{"question": "a [NEW] b", "answer": "[NEW]"}\n' * 4)
    settings = {**QUICK, "num_train_epochs": 3, "save_strategy": "epoch"}
    folder = run(path, model=model, output_dir=tmp_path / "run", control_tokens="allow", settings=settings, **options)
    assert losses(folder)[-1] < losses(folder)[0]
    report = compare(folder, n=1, max_new_tokens=2)
    assert report.tuned.perplexity < report.base.perplexity


def test_tokenizer_of_another_model_is_refused(llama, tmp_path):
    smaller = AutoModelForCausalLM.from_pretrained(llama)
    smaller.resize_token_embeddings(100)
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    smaller.save_pretrained(model)
    with pytest.raises(UsageError, match="contains token id"):
        run(write(tmp_path), model=str(model), output_dir=tmp_path / "run")


def test_sampling_settings_of_the_base_model_are_accepted(llama, data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.6, "top_p": 0.9}))
    folder = run(data, model=str(model), output_dir=tmp_path / "run", settings={"max_steps": 1})
    assert (folder / "model" / "model.safetensors").is_file()
    assert compare(folder, n=1, max_new_tokens=1).rows


def test_options_override_the_configuration_file(llama, data, tmp_path):
    from ftdata.train import _resolve

    path = tmp_path / "run.yaml"
    path.write_text(
        f"data: {data}\nmodel: {llama}\noutput_dir: {tmp_path / 'run'}\nlora: {{r: 16, alpha: 64}}\n"
        "train: {learning_rate: 2e-4, save_strategy: no}\n"
    )
    config, build = _resolve(path, None, None, {"lora_r": 8, "train": {"max_steps": 1}})
    assert build is None
    assert (config.lora.r, config.lora.alpha) == (8, 64)
    assert config.train == {"learning_rate": 2e-4, "save_strategy": "no", "max_steps": 1}


def test_stored_options_cannot_load_code(llama, data, tmp_path):
    """Code in an untrusted folder is not run."""
    from ftdata.build.store import read_manifest
    from ftdata.train.inference.prompts import rebuild_recipe

    build_sft_dataset(data, llama, output_dir=tmp_path / "out")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\ndef fn(row): pass\n")
    options = read_manifest(tmp_path / "out")["options"] | {"schema": f"{tmp_path / 'evil.py'}:fn"}
    assert rebuild_recipe(str(llama), options).schema == "auto"
    assert not (tmp_path / "mark").exists()


def test_tokenizer_with_custom_code_is_refused(llama, tmp_path):
    """The refusal needs no interactive confirmation."""
    from ftdata.train.model.load import load_trainer_tokenizer

    folder = tmp_path / "model"
    shutil.copytree(llama, folder)
    known = json.loads((folder / "tokenizer_config.json").read_text())
    known |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(known))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(InputRefused):
        load_trainer_tokenizer(str(folder))
    assert not (tmp_path / "mark").exists()
