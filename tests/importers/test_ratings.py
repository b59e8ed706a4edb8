"""Import of the settings of other tools for KTO and reward models."""

import json

import pytest
import yaml

from ftdata.errors import UsageError
from ftdata.importers import import_config
from ftdata.schemas import normalize
from ftdata.types import UNKNOWN_SOURCE, Row


def axolotl(folder, **values):
    path = folder / "axolotl.yaml"
    path.write_text(yaml.safe_dump({"base_model": "m", "learning_rate": 1e-4, **values}))
    return path


def factory(folder, info, **values):
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "x.json", **info}}))
    path = folder / "factory.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "m", "dataset": "mine", "dataset_dir": "data", **values}))
    return path


def read(config, row):
    """Return the texts of the messages of each side, and the label."""
    task = {"reward": "preference"}.get(config.task, config.task)
    made = normalize(Row(row, UNKNOWN_SOURCE), config.schema, config.columns, task)
    return [[message["content"] for message in part.messages] for part in made.parts], made.feedback.get("label")


def test_axolotl_kto_is_imported(tmp_path):
    datasets = [{"path": "d.jsonl", "type": "chatml.argilla"}]
    path = axolotl(tmp_path, rl="kto", rl_beta=0.2, kto_undesirable_weight=0.5, sample_packing=True, datasets=datasets)
    found = import_config(path)
    config = found.config
    assert (config.task, config.template, config.packing) == ("kto", "chatml", None)
    assert (config.train["beta"], config.train["undesirable_weight"]) == (0.2, 0.5)
    assert read(config, {"instruction": "q", "completion": "a", "label": False}) == ([["q", "a"]], 0)
    with pytest.raises(UsageError, match="no equivalent for the data set type user_defined"):
        import_config(axolotl(tmp_path, rl="kto", datasets=[{"path": "d.jsonl", "type": "user_defined"}]))


def test_axolotl_reward_model_is_imported(tmp_path):
    datasets = [{"path": "d.jsonl", "type": "bradley_terry.chat_template"}]
    config = import_config(axolotl(tmp_path, reward_model=True, datasets=datasets)).config
    assert config.task == "reward"
    row = {"system": "s", "input": "q", "chosen": "a", "rejected": "b"}
    assert read(config, row)[0] == [["s", "q", "a"], ["s", "q", "b"]]
    with pytest.raises(UsageError, match="type is 'alpaca', expected bradley_terry.chat_template"):
        import_config(axolotl(tmp_path, reward_model=True, datasets=[{"path": "d.jsonl", "type": "alpaca"}]))


@pytest.mark.parametrize("tag", ["kto_tag", "good"])
def test_llamafactory_kto_is_imported(tmp_path, tag):
    info = {"formatting": "sharegpt", "columns": {"messages": "talk", "kto_tag": tag}}
    path = factory(tmp_path, info, stage="kto", pref_beta=0.3, kto_rejected_weight=2.0, packing=True)
    config = import_config(path).config
    assert (config.task, config.packing) == ("kto", None)
    assert [config.train[name] for name in ("beta", "desirable_weight", "undesirable_weight")] == [0.3, 1.0, 2.0]
    row = {"talk": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], tag: True}
    assert read(config, row) == ([["q", "a"]], 1)
    with pytest.raises(UsageError, match="the column kto_tag is missing"):
        import_config(factory(tmp_path, {}, stage="kto"))


def test_llamafactory_reward_model_is_imported(tmp_path):
    path = factory(tmp_path, {"ranking": True}, stage="rm")
    config = import_config(path).config
    assert (config.task, "beta" in config.train) == ("reward", False)
    assert read(config, {"instruction": "q", "chosen": "a", "rejected": "b"})[0] == [["q", "a"], ["q", "b"]]
    with pytest.raises(UsageError, match="stage is 'ppo', expected sft, pt, dpo, rm or kto"):
        import_config(factory(tmp_path, {}, stage="ppo"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"roles_to_train": ["user"]}, "reads roles_to_train only in a data set.*entries of datasets"),
        (
            {"datasets": [{"path": "a", "type": "chat_template", "train_on_inputs": True}]},
            "move this key out of datasets",
        ),
        ({"datasets": [{"path": "a", "type": "chat_template", "roles_to_trian": ["user"]}]}, "mean roles_to_train"),
    ],
)
def test_misspelled_and_misplaced_mask_keys_are_refused(changes, says, tmp_path):
    with pytest.raises(UsageError, match=f"cannot_import.*{says}"):
        import_config(axolotl(tmp_path, **changes))
