"""Importers: settings of other tools are imported, noted or refused, and the rendered text is the same."""

import json

import pytest

from ftdata import build_sft_dataset, preview
from ftdata.build.dataset import write_build
from ftdata.config import Config, Lora, load_config
from ftdata.errors import UsageError
from ftdata.importers import import_config
from ftdata.importers.axolotl import KEYS as AXOLOTL
from ftdata.importers.draft import Draft, apply_rules
from ftdata.importers.llamafactory import KEYS as FACTORY
from ftdata.schemas import normalize
from ftdata.types import UNKNOWN_SOURCE, Row
from ftdata.yaml12 import dump_yaml

AXOLOTL_FILE = {
    "base_model": "me/base", "datasets": [{"path": "data.jsonl", "type": "chat_template"}], "adapter": "qlora", "load_in_4bit": True,
    "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True, "sequence_len": 1024, "sample_packing": True, "val_set_size": 0.1,
    "micro_batch_size": 2, "num_epochs": 4, "learning_rate": 2e-4, "warmup_ratio": 0.1, "evals_per_epoch": 2, "flash_attention": True,
    "bf16": "auto", "output_dir": "./out", "dataset_prepared_path": "prepared", "wandb_project": "", "seed": 7,
}  # fmt: skip
FACTORY_FILE = {
    "model_name_or_path": "me/base", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "q_proj, v_proj",
    "dataset": "faq", "template": "qwen", "cutoff_len": 512, "output_dir": "out", "learning_rate": 1e-4, "quantization_bit": 4,
    "val_size": 5, "warmup_ratio": 0.1, "flash_attn": "fa2", "neat_packing": True, "max_samples": 100,
}  # fmt: skip
INFOS = {
    "faq": {"file_name": "faq.json", "columns": {"prompt": "q", "query": "more", "response": "a", "system": "rule"}},
    "chats": {"hf_hub_url": "me/chats", "subset": "en", "formatting": "sharegpt", "num_samples": 10,
              "tags": {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation"}},
    "odd": {"file_name": "x.json", "formatting": "sharegpt", "tags": {"user_tag": "customer"}},
    "media": {"file_name": "x.json", "columns": {"prompt": "q", "videos": "i"}},
    "ranked": {"file_name": "x.json", "ranking": True},
}  # fmt: skip


def axolotl(folder, **changes):
    path = folder / "axolotl.yaml"
    path.write_text(dump_yaml({**AXOLOTL_FILE, **changes}))
    return path


def factory(folder, **changes):
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "dataset_info.json").write_text(json.dumps(INFOS))
    path = folder / "train.yaml"
    path.write_text(dump_yaml({**FACTORY_FILE, **changes}))
    return path


def test_adapters_and_quantization_are_imported(tmp_path):
    config = import_config(
        axolotl(tmp_path, adapter="lora", load_in_4bit=False, load_in_8bit=True, peft_use_dora=True)
    ).config
    assert (config.quantization, config.lora.extra_fields) == ("int8", {"use_dora": True})
    config = import_config(
        factory(tmp_path, quantization_bit=8, use_rslora=True, additional_target="embed_tokens, lm_head")
    ).config
    assert config.quantization == "int8"
    assert config.lora.extra_fields == {"use_rslora": True, "modules_to_save": ["embed_tokens", "lm_head"]}
    assert import_config(factory(tmp_path, quantization_type="fp4")).config.quantization == "fp4"


def test_note_if_rows_and_a_test_split_are_selected_in_another_order(tmp_path):
    notes = import_config(factory(tmp_path, dataset="chats", val_size=5)).notes
    assert any(note.startswith("num_samples: LLaMA-Factory splits off val_size after") for note in notes)
    assert not any("num_samples" in note for note in import_config(factory(tmp_path, dataset="faq")).notes)


def test_axolotl_configuration_is_imported(tmp_path):
    found = import_config(axolotl(tmp_path))
    config = found.config
    assert found.tool == "Axolotl"
    assert (config.model, config.output_dir, config.max_length, config.packing) == ("me/base", "./out", 1024, "bfd")
    assert (config.quantization, config.lora.r, config.lora.alpha, config.lora.target_modules) == (
        "nf4",
        8,
        16,
        "all-linear",
    )
    assert (config.test_size, config.seed, config.on_bad_rows, config.max_rejects) == (0.1, 7, "error", None)
    assert config.data == [{"path": "data.jsonl"}]
    assert config.attn_implementation == "flash_attention_2"
    assert config.train == {
        "per_device_train_batch_size": 2, "num_train_epochs": 4, "learning_rate": 2e-4, "warmup_steps": 0.1, "seed": 7,
        "save_total_limit": 4, "lr_scheduler_type": "cosine", "optim": "adamw_torch_fused", "gradient_checkpointing": False,
        "eval_strategy": "steps", "eval_steps": 1 / 8,
    }  # fmt: skip
    assert any("dataset_prepared_path" in note for note in found.notes)
    assert "left out, because the default of ftdata is used: bf16: auto" in found.notes
    path = tmp_path / "run.yaml"
    path.write_text(str(found))
    assert load_config(path) == config


def test_imported_data_sets_are_combined_without_packed_builds(tmp_path, tokenizer_dir):
    for name, row in (("a", {"instruction": "q", "output": "a"}), ("b", {"messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]})):  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    kinds = {"a": "alpaca", "b": "chat_template"}
    infos = [{"path": str(tmp_path / f"{name}.jsonl"), "type": kind} for name, kind in kinds.items()]
    path = axolotl(tmp_path, datasets=infos, chat_template="chatml")
    with pytest.raises(UsageError, match=r"build FILE -o FOLDER.*and packing, in another configuration"):
        import_config(path)
    for number, name in enumerate(kinds):
        found = import_config(path, datasets=[str(number)])
        assert any(note.startswith("packing: left out") for note in found.notes)
        options = {name: value for name, value in found.config.build_options().items() if name != "test_size"}
        write_build(found.config.data, tokenizer_dir("tiny_bpe"), tmp_path / f"built_{name}", **options)
    built = [str(tmp_path / "built_a"), str(tmp_path / "built_b")]
    packed = build_sft_dataset(built, tokenizer_dir("tiny_bpe"), packing="bfd", max_length=1024)["train"]
    assert [len(row["seq_lengths"]) for row in packed] == [2]


PAIR_ROWS = {
    "chat_template.default": {
        "messages": [{"role": "user", "content": "q"}],
        **{side: {"role": "assistant", "content": side} for side in ("chosen", "rejected")},
    },
    "chatml.intel": {"system": "", "question": "q", "chosen": "chosen", "rejected": "rejected"},
    "chatml.icr": {"input": "q", "chosen": "chosen", "rejected": "rejected"},
    "chatml": {"instruction": "q", "chosen": "chosen", "rejected": "rejected"},
    "chatml.ultra": {
        "prompt": "q",
        **{
            side: [{"role": "user", "content": "q"}, {"role": "assistant", "content": side}]
            for side in ("chosen", "rejected")
        },
    },
}


def read_pair_sides(config, row):
    """Return the texts of the prompt, and of both sides, that a build with an imported configuration reads."""
    pair = normalize(Row(row, UNKNOWN_SOURCE), config.schema, config.columns, config.task)
    return [message["content"] for message in pair.messages[:-1]], [side.messages[-1]["content"] for side in pair.sides]


@pytest.mark.parametrize("kind", PAIR_ROWS)
def test_axolotl_preference_configuration_is_imported(tmp_path, kind):
    settings = {"rl": "ipo", "rl_beta": 0.2, "datasets": [{"path": "data.jsonl", "type": kind}]}
    found = import_config(axolotl(tmp_path, **settings))
    assert (found.config.task, found.config.packing, found.config.train["beta"]) == ("preference", None, 0.2)
    assert found.config.train["loss_type"] == ["ipo"]
    assert found.config.template == (None if kind == "chat_template.default" else "chatml")
    assert read_pair_sides(found.config, PAIR_ROWS[kind]) == (["q"], ["chosen", "rejected"])
    assert any(note.startswith("sample_packing: left out") for note in found.notes)


@pytest.mark.parametrize(
    ("info", "row", "prompt"),
    [
        (
            {"columns": {"prompt": "ask", "query": "more", "chosen": "good", "rejected": "bad"}},
            {"ask": "q", "more": "m", "good": "chosen", "bad": "rejected"},
            "q\n\nm",
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "talk", "chosen": "good", "rejected": "bad"}},
            {"talk": [{"from": "human", "value": "q"}], "good": {"from": "gpt", "value": "chosen"},
             "bad": {"from": "gpt", "value": "rejected"}},
            "q",
        ),
    ],
)  # fmt: skip
def test_llamafactory_preference_configuration_is_imported(tmp_path, info, row, prompt):
    path = factory(tmp_path, stage="dpo", dataset="pairs", pref_beta=0.3, pref_loss="hinge", pref_ftx=0.5)
    infos = {"pairs": {"file_name": "x.json", "ranking": True, **info}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(infos))
    config = import_config(path).config
    assert (config.task, config.packing, config.train["beta"]) == ("preference", None, 0.3)
    assert (config.train["loss_type"], config.train["loss_weights"]) == (["hinge", "sft"], [1.0, 0.5])
    assert read_pair_sides(config, row) == ([prompt], ["chosen", "rejected"])
    assert import_config(tmp_path / "data" / "dataset_info.json").config.task == "preference"


def test_axolotl_defaults_are_written_explicitly(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("base_model: m\ndatasets: [{path: me/data, type: alpaca}]\nlearning_rate: 1e-4\n")
    config = import_config(path).config
    assert (config.max_length, config.seed, config.lora, config.template) == (512, 42, None, "alpaca")
    assert config.data == [{"path": "me/data", "split": "train"}]
    assert (
        config.train["num_train_epochs"],
        config.train["per_device_train_batch_size"],
        config.train["warmup_steps"],
    ) == (1, 1, 0.03)


def texts(config, rows):
    """Return the rendered rows of an imported configuration, with the trained text in brackets."""
    options = {name: getattr(config, name) for name in ("template", "schema", "columns", "train_on")}
    lines = str(preview(rows, **options, n=len(rows))).split("── row ")[1:]
    return ["\n".join(one.strip().split("\n")[1:-1]).replace("↵", "") for one in lines]


PREAMBLE = "Below is an instruction that describes a task"
CASES = {
    "alpaca": (
        "alpaca",
        [{"instruction": "Add.", "input": "1+1", "output": "2"}, {"instruction": "Add.", "input": "", "output": "2"}],
        [
            f"{PREAMBLE}, paired with an input that provides further context. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nAdd.\n\n### Input:\n1+1\n\n### Response:\n⟦2⟨<eos>⟩■⟧",
            f"{PREAMBLE}. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n⟦2⟨<eos>⟩■⟧",
        ],
    ),
    "own format": (
        {"system_prompt": 'Be "good".', "system_format": "<<{system}>>\n", "field_instruction": "q", "field_output": "a", "field_input": "c",
         "format": "Q: {instruction} ({input}) {{x}}\nA: ", "no_input_format": "Q: {instruction}\nA: "},
        [{"q": "1+1?", "c": "sum", "a": "2"}, {"q": "1+1?", "a": "2"}, {"q": "1+1?", "a": "2", "system": "Short."}],
        ['<<Be "good".>>\nQ: 1+1? (sum) {x}\nA: ⟦2⟨<eos>⟩■⟧', '<<Be "good".>>\nQ: 1+1?\nA: ⟦2⟨<eos>⟩■⟧', "<<Short.>>\nQ: 1+1?\nA: ⟦2⟨<eos>⟩■⟧"],
    ),
    "without a format for rows without input": (
        {"field_instruction": "q", "field_output": "a", "format": "Q: {instruction} {input}\nA: "},
        [{"q": "1+1?", "a": "2"}],
        ["1+1? ⟦2⟨<eos>⟩■⟧"],
    ),
    "braces, Jinja and odd breaks": (
        {"field_instruction": "q", "field_output": "a", "no_input_format": "\\boxed{{{instruction}}} {{{{ x }}}} {{% if %}}\x85\u2028 "},
        [{"q": "1+1?", "a": "2"}],
        ["\\boxed{1+1?} {{ x }} {% if %}\\u0085\\u2028 ⟦2⟨<eos>⟩■⟧"],
    ),
    "completion": ("completion", [{"text": "Once there was."}], ["⟦Once there was.⟨<eos>⟩■⟧"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_rendered_text_equals_that_of_axolotl(case, tmp_path):
    """The expected text is that of axolotl 0.19.0."""
    kind, rows, expected = CASES[case]
    config = import_config(axolotl(tmp_path, datasets=[{"path": "d.jsonl", "type": kind}])).config
    assert texts(config, rows) == expected


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rl": "orpo"}, "rl is 'orpo', expected dpo, ipo or kto"),
        ({"adapter": "oft"}, "adapter is 'oft'"),
        ({"loraplus_lr_ratio": 16, "relora": True}, "loraplus_lr_ratio: .*; relora: "),
        ({"excess_length_strategy": "split"}, "excess_length_strategy is 'split'"),
        ({"datasets": []}, "expected a list of mappings"),
        ({"datasets": "x"}, "expected a list of mappings"),
        ({"datasets": [{"path": "a", "type": "alpaca"}, {"path": "b", "type": "chat_template"}]}, "need different values of .*schema.*--dataset"),
        ({"datasets": [{"path": "a", "type": "gpteacher"}]}, "no equivalent for the data set type gpteacher"),
        ({"datasets": [{"path": "a", "type": "sharegpt"}]}, "use type: chat_template"),
        ({"datasets": [{"path": "a", "type": "chat_template", "roles": {"user": ["customer"]}}]}, "'customer' means user in the file, but ftdata does not support this role"),
        ({"datasets": [{"path": "a", "type": "chat_template", "roles": {"assistant": ["human"]}}]}, "'human' means assistant in the file, but ftdata reads it as user"),
        ({"datasets": [{"path": "a", "type": "chat_template", "roles_to_train": ["user"]}]}, "roles_to_train"),
        ({"datasets": [{"path": "a", "type": "chat_template", "roles_to_train": []}]}, "roles_to_train"),
        ({"datasets": [{"path": "a", "type": "chat_template", "message_field_training": "learn"}]}, "'learn'.*rename this message field to train"),
        ({"datasets": [{"path": "a", "type": "chat_template", "message_property_mappings": {"content": "body"}}]}, "the content of each message is under the key 'body'"),
        ({"datasets": [{"path": "a", "type": "chat_template", "chat_template": "mine"}]}, "the chat_template mine cannot be converted"),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin", "my.Plugin"]}, "the plugin my.Plugin cannot be converted"),
        ({"datasets": [{"path": "a", "type": "alpaca", "format": "{instruction}"}]}, "Axolotl does not read format at this level"),
        ({"datasets": [{"path": "a", "type": "chat_template", "drop_system_message": True}]}, "drop_system_message"),
        ({"datasets": [{"path": "a", "type": {"field_question": "q"}}]}, "unknown keys: field_question"),
        ({"learning_rate": {"a": 1}, "val_set_size": "x"}, "a value that is not valid in Axolotl"),
        ({"val_set_size": float("inf")}, "the size of the validation split is inf"),
        ({"val_set_size": -1}, "the size of the validation split is -1"),
        ({"num_epochs": 0}, "num_epochs is 0, expected positive"),
        ({"datasets": [{"path": 5, "type": "alpaca"}]}, "datasets contains the path 5"),
        ({"datasets": [{"path": "a", "type": "alpaca", "ds_type": "./mine.py:read"}]}, "ds_type is './mine.py:read', expected json"),
        ({"datasets": [{"path": "a", "type": {"format": "{instruction!s}"}}]}, "the format"),
        ({"datasets": [{"path": "a", "type": {"format": "{0}"}}]}, "the format"),
        ({"datasets": [{"path": "a", "type": {"format": "{"}}]}, "a value that is not valid in Axolotl"),
    ],
)  # fmt: skip
def test_unsupported_axolotl_settings_are_refused_with_their_key(changes, says, tmp_path):
    with pytest.raises(UsageError, match=says) as error:
        import_config(axolotl(tmp_path, **changes))
    assert error.value.code == "cannot_import"
    assert error.value.where.endswith("axolotl.yaml")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test_datasets": [{"path": "x"}]}, "test_datasets: left out: hold out rows"),
        ({"colour": True}, "unknown keys, left out: colour"),
        ({"datasets": [{"path": "a", "type": "alpaca", "feild": "x"}]}, "a: unknown keys, left out: feild"),
        ({"trust_remote_code": True}, "trust_remote_code: left out"),
        ({"val_set_size": 0, "eval_steps": 5}, "eval_steps: left out, because no rows are held out"),
        ({"train_on_inputs": True}, "excludes the headers"),
        ({"zz\ntrain_on: all\n#": 1}, "left out: zz\\ntrain_on: all"),
        ({"load_in_8bit": True}, "load_in_8bit: left out"),
        ({"adapter": "lora"}, "loaded in 16 bits"),
        ({"datasets": [{"path": "a", "type": "chat_template", "field_tools": "functions"}]}, "field_tools has no effect"),
        ({"datasets": [{"path": "a", "type": "chat_template", "train_on_eos": "last"}]}, "stop token of every trained turn is trained"),
        ({"datasets": [{"path": "a", "type": "completion"}]}, "Axolotl splits long texts"),
    ],
)  # fmt: skip
def test_differences_from_axolotl_are_noted(changes, says, tmp_path):
    found = import_config(axolotl(tmp_path, **changes))
    assert any(says in note for note in found.notes), found.notes
    assert f"# - {found.notes[0]}\n" in str(found)


def test_one_of_several_data_sets_can_be_selected(tmp_path):
    several = [{"path": "a", "type": "alpaca"}, {"path": "b", "type": "chat_template", "field_messages": "talk"}]
    path = axolotl(tmp_path, datasets=several)
    assert import_config(path, ["b"]).config.columns == {"messages": "talk"}
    assert import_config(path, ["0"]).config.template == "alpaca"
    with pytest.raises(UsageError, match="no data set 'c', only a, b"):
        import_config(path, ["c"])


def test_split_slices_and_all_linear_layers_are_imported(tmp_path):
    given = {
        "datasets": [{"path": "d.jsonl", "type": "alpaca", "split": "train[:5]"}],
        "lora_target_modules": ["q_proj"],
        "warmup_steps": 7,
    }
    config = import_config(axolotl(tmp_path, **given)).config
    assert config.data == [{"path": "d.jsonl", "split": "train[:5]"}]
    assert (config.lora.target_modules, config.train["warmup_steps"]) == ("all-linear", 7)


def test_files_of_a_folder_become_separate_sources(tmp_path):
    files = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    given = [{"path": str(tmp_path), "data_files": files, "type": "chat_template"}]
    assert import_config(axolotl(tmp_path, datasets=given)).config.data == [{"path": file} for file in files]


def test_llamafactory_configuration_is_imported(tmp_path):
    found = import_config(factory(tmp_path))
    config = found.config
    assert found.tool == "LLaMA-Factory"
    assert config.data == [{"path": str(tmp_path / "data" / "faq.json")}]
    assert config.columns == {"instruction": "q", "input": "more", "output": "a", "system": "rule"}
    assert (config.schema, config.max_length, config.packing, config.test_size, config.limit) == (
        "alpaca",
        512,
        "bfd",
        5,
        100,
    )
    assert (config.quantization, config.lora.r, config.lora.alpha, config.lora.target_modules) == (
        "nf4",
        8,
        16,
        ["q_proj", "v_proj"],
    )
    assert config.train["warmup_steps"] == 0.1
    assert config.train["num_train_epochs"] == 3
    assert any(note.startswith("template: qwen: LLaMA-Factory uses built-in templates") for note in found.notes)
    assert any("joined by a blank line" in note for note in found.notes)
    full = import_config(
        factory(tmp_path, finetuning_type="full", quantization_bit=None, mask_history=True, dataset="chats")
    ).config
    assert (full.lora, full.train_on) == (None, "last_assistant")
    assert full.data == [{"path": "me/chats", "split": "train", "name": "en", "rows": 10}]


def test_dataset_info_alone_is_imported(tmp_path):
    factory(tmp_path)
    path = tmp_path / "data" / "dataset_info.json"
    found = import_config(path, ["chats"], model="me/base")
    assert (found.config.model, found.config.columns) == ("me/base", None)
    with pytest.raises(UsageError, match="the file contains 5 data sets.*select data sets with --dataset: faq, chats"):
        import_config(path)
    assert any("has no base model" in note for note in import_config(path, ["faq"]).notes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stage": "ppo"}, "stage is 'ppo'"),
        (
            {"dataset": "faq,chats"},
            "need different values of schema, columns .faq: schema alpaca.*data to the list of these folders",
        ),
        ({"dataset": "fag"}, "no data set 'fag'.*did you mean 'faq'"),
        ({"dataset": ""}, "dataset is empty"),
        ({"dataset": "odd"}, "'customer' means user"),
        ({"dataset": "media"}, "columns videos"),
        ({"dataset": "ranked"}, "ranking"),
        ({"dataset_dir": "nowhere"}, "cannot be read"),
        ({"finetuning_type": "oft"}, "finetuning_type is 'oft'"),
        ({"quantization_bit": 3}, "quantization_bit is 3"),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_bit is 4, the method is hqq"),
        ({"use_galore": True}, "use_galore"),
        ({"mix_strategy": "interleave_under"}, "mix_strategy"),
    ],
)
def test_unsupported_llamafactory_settings_are_refused(changes, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        import_config(factory(tmp_path, **changes))


@pytest.mark.parametrize("text", ["a: 1", "model: m\ndata: d\noutput_dir: o\n", "[1]", "a: ["])
def test_other_files_are_refused(text, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="unknown_tool|config_file"):
        import_config(path)


USUAL = {
    "axolotl": "learning_rate weight_decay max_grad_norm gradient_accumulation_steps max_steps warmup_steps save_steps eval_steps logging_steps",
    "factory": "learning_rate weight_decay max_grad_norm gradient_accumulation_steps max_steps num_train_epochs lr_scheduler_type optim bf16",
}


def test_common_training_settings_are_imported():
    assert set(USUAL["axolotl"].split()) <= set(AXOLOTL.same_name)
    assert set(USUAL["factory"].split()) <= set(FACTORY.same_name)


@pytest.mark.parametrize("keys", [AXOLOTL, FACTORY], ids=["axolotl", "llamafactory"])
def test_every_key_maps_to_an_existing_field(keys):
    SFTConfig = pytest.importorskip("trl").SFTConfig  # noqa: N806
    targets = [rule for rule in keys.rules.values() if isinstance(rule, str)] + [
        f"train.{name}" for name in keys.same_name
    ]
    given = {
        **dict.fromkeys(keys.same_name, 3),
        **{key: 3 for key, rule in keys.rules.items() if isinstance(rule, str)},
    }
    draft = Draft()
    apply_rules(given, keys, draft)
    carried = {f"{name}.{inner}" for name, value in draft.fields.items() if isinstance(value, dict) for inner in value}
    assert {*targets} <= carried | set(draft.fields)
    for target in targets:
        section, _, field = target.partition(".")
        if section == "train":
            assert field in SFTConfig.__dataclass_fields__, target
        else:
            assert section in Config.__struct_fields__, target
    groups = [set(keys.rules), set(keys.same_name), set(keys.ignored), set(keys.notes), set(keys.unsupported)]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_templates_of_models_and_kernels_are_imported(tmp_path):
    plugins = ["axolotl.integrations.liger.LigerPlugin"]
    found = import_config(axolotl(tmp_path, chat_template="llama3", plugins=plugins, liger_rope=True))
    assert found.config.template is None
    assert any(
        note.startswith("chat_template llama3: ftdata uses the chat template of the model") for note in found.notes
    )
    assert any("liger_rope" in note for note in found.notes)
    assert any(
        "enable_liger_kernel" in note for note in import_config(factory(tmp_path, enable_liger_kernel=True)).notes
    )


def test_several_data_sets_in_a_list_are_imported(tmp_path):
    infos = {name: {"file_name": f"{name}.json"} for name in ("one", "two")}
    path = factory(tmp_path, dataset=["one", "two"])
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(infos))
    assert [source["path"].rpartition("/")[2] for source in import_config(path).config.data] == ["one.json", "two.json"]


def test_pretraining_of_llama_factory_trains_all_of_each_text(tmp_path, tokenizer_dir):
    path = factory(tmp_path, stage="pt", dataset="texts", val_size=0, max_samples=None)
    info = {"texts": {"file_name": "texts.json", "columns": {"prompt": "body"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "data" / "texts.json").write_text(json.dumps([{"body": "one text"}, {"body": "another"}]))
    config = import_config(path).config
    assert (config.schema, config.columns, config.packing) == ("text", {"text": "body"}, "bfd")
    options = config.build_options()
    assert options.pop("task") == "auto"
    dataset = build_sft_dataset(config.data, tokenizer_dir("tiny_bpe"), **options)
    counts = dataset.report.splits["train"]
    # Nothing precedes the first token of a text, so no model can predict it.
    assert counts["trained"] == counts["tokens"] - 2
    assert dataset.report.totals["built"] == 2


def test_settings_that_change_the_labels_or_the_adapter_are_kept(tmp_path):
    thinking = import_config(factory(tmp_path, enable_thinking=False)).config
    assert thinking.template_kwargs == {"enable_thinking": False}
    with pytest.raises(UsageError, match="default_system: it changes the text"):
        import_config(factory(tmp_path, default_system="Be brief."))
    with pytest.raises(UsageError, match=r"unknown key sample_paking.*did you mean sample_packing"):
        import_config(axolotl(tmp_path, sample_paking=True))
    bare = dict.fromkeys(("lora_r", "lora_alpha", "lora_target_linear"))
    adapter = import_config(axolotl(tmp_path, adapter="lora", load_in_4bit=None, **bare))
    assert adapter.config.lora == Lora()
    assert any("no lora_r" in note for note in adapter.notes)


@pytest.mark.parametrize(
    ("times", "epochs", "strategy"), [(1, 1, "epoch"), (1, 4, "epoch"), (2, 1, "steps"), (4, 2, "steps")]
)
def test_saves_per_epoch_are_imported(times, epochs, strategy, tmp_path):
    """Trainer reads a share of 1.0 as an interval of one step."""
    settings = import_config(axolotl(tmp_path, saves_per_epoch=times, num_epochs=epochs)).config.train
    assert settings["save_strategy"] == strategy
    assert settings.get("save_steps") == (None if strategy == "epoch" else 1 / (times * epochs))
