"""Redaction: secrets are recognized by name and by value; the names of special tokens are not secrets."""

import json
import os
import subprocess
import sys

import pytest

from ftdata.build.push import _check_secrets
from ftdata.config import load_config, make_config, parse_settings, to_yaml
from ftdata.errors import InputRefused, UsageError
from ftdata.redaction import REDACTED, drop_redacted, is_redacted, is_secret_name, redact, redact_text

SECRET_NAMES = [
    "hub_token", "HF_TOKEN", "token", "api_token", "access_token", "hubToken", "X-Auth-Token", "hftoken", "wandb_api_key", "apiKey", "api-key",
    "AWS_SECRET_ACCESS_KEY", "aws_access_key_id", "secret", "client_secret", "password", "DB_PASSWORD", "passphrase", "credentials", "GITHUB_TOKEN_2",
]  # fmt: skip
PLAIN_NAMES = [
    "eos_token", "pad_token", "bos_token", "unk_token", "mask_token", "additional_special_tokens", "image_token", "max_new_tokens", "pad_token_id",
    "tokenizer", "tokens_per_step", "trained_tokens", "control_tokens", "num_tokens", "include_num_input_tokens_seen", "token_ids", "tokens",
    "HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "tokenizer_name", "run_name", "key", "data_seed", "PWD", "alora_invocation_tokens", "trainable_token_indices",
]  # fmt: skip
SECRETS = [
    "hf_" + "aB3" * 11, "hf_" + "abcdefgh" * 4, "sk-proj-" + "aB3_" * 8, "sk-ant-api03-" + "x9" * 12, "AKIA" + "IOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2_" * 8, "glpat-" + "a1B2" * 5, "xoxb-123456789012-abcdef",
]  # fmt: skip
PLAIN = ["task-oriented-dialogue-v2-filtered", "hf_hub_url", "hf_transfer", "hf-internal-testing/tiny", "risk-averse-model-name", "https://host:8080/a@b",
         "hf://datasets/me/faq@main", "ssh://git@host/repo", "s3://bucket/key", "2024-11-23", "meta-llama/Llama-3.2-1B", "</s>", "a" * 40,
         "{% set x = message['token'] %}{{ eos_token }}", "https://host/d.json?page=2&tokens=5"]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_is_recognized_by_its_name(name):
    assert is_secret_name(name)
    assert redact({"train": {name: "plain words"}}) == {"train": {name: REDACTED}}
    assert redact({name: ["one", {"x": "two"}], "other": None}) == {name: [REDACTED, {"x": REDACTED}], "other": None}


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_special_token_names_are_not_redacted(name):
    values = {name: "</s>", "inner": [{name: 3}]}
    assert redact(values) == values


def test_special_token_values_and_booleans_are_not_redacted():
    values = {"weird_token": "<|weird|>", "use_auth_token": True, "hub_token": None, "password": False}
    assert redact(values) == values
    assert redact({"password": 123456}) == {"password": REDACTED}


@pytest.mark.parametrize("secret", SECRETS)
def test_secret_is_recognized_by_its_value(secret):
    for text in (secret, f"before {secret} after", f"https://host/{secret}/x", f"name={secret}"):
        for found in (redact({"data": [text]})["data"][0], redact_text(text)):
            assert secret not in found
            assert REDACTED in found


@pytest.mark.parametrize("text", PLAIN)
def test_ordinary_text_is_not_redacted(text):
    assert redact(text) == text
    assert redact_text(text) == text


def test_credentials_in_urls_are_redacted():
    assert redact("https://me:p4ss@host/d.json") == f"https://{REDACTED}@host/d.json"
    assert redact("get https://abcdef@host/d now") == f"get https://{REDACTED}@host/d now"
    assert "wJalrX" not in redact("Invalid bucket name AKIAABCDEFGHIJKLMNOP:wJalrXUtnFEMI@bucket")
    assert (
        redact("http://host/x?auth=abc&pwd=d&jwt=e") == f"http://host/x?auth={REDACTED}&pwd={REDACTED}&jwt={REDACTED}"
    )
    assert redact("http:/me:p4ss@host/d") == f"http:/{REDACTED}@host/d"
    assert redact("http://host/x#access_token=abc") == f"http://host/x#access_token={REDACTED}"
    assert redact("postgres://:pw@host/db") == f"postgres://{REDACTED}@host/db"
    url = "https://b.s3.amazonaws.com/d?X-Amz-Credential=AKIA1/x&X-Amz-Signature=0123abc&versionId=7"
    assert (
        redact(url)
        == f"https://b.s3.amazonaws.com/d?X-Amz-Credential={REDACTED}&X-Amz-Signature={REDACTED}&versionId=7"
    )


def test_secrets_from_the_environment_are_redacted(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    monkeypatch.setenv("HF_TOKEN", "abcd")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "true")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/token-file")
    assert redact(["abcd", "x correct horse battery y", "abcde", "true", "/home/me/token-file"]) == [
        REDACTED, f"x {REDACTED} y", "abcde", "true", "/home/me/token-file",
    ]  # fmt: skip


def test_assigned_secrets_in_messages_are_redacted():
    assert redact_text("--set hub_token=abc --set seed=1") == f"--set hub_token={REDACTED} --set seed=1"
    assert redact_text('{"hub_token": "abc", "eos_token": "x"}') == f'{{"hub_token": "{REDACTED}", "eos_token": "x"}}'
    for kept in ("expected token='x'", "messages[1].password: is a number", "eos_token=x", "unexpected token: 'end'"):
        assert redact_text(kept) == kept


@pytest.mark.parametrize("value", [{"hub_token": "x"}, "https://a:b@c", ["hf_" + "aB3" * 11], {"password": 5}])
def test_redaction_is_idempotent_and_detectable(value):
    once = redact(value)
    assert redact(once) == once
    assert is_redacted(once)
    assert not is_redacted(value)
    assert redact_text(json.dumps(once)) == json.dumps(once)


def test_redacted_fields_are_dropped_by_name():
    values = {"data": f"https://{REDACTED}@host", "train": {"hub_token": REDACTED, "seed": 1}}
    assert drop_redacted(values) == ({"data": values["data"], "train": {"seed": 1}}, ["train.hub_token"])


def test_stored_configuration_is_loaded_without_redacted_secrets(tmp_path):
    config = make_config({"data": "d", "model": "m", "output_dir": "o", "train": {"hub_token": "hf_x", "seed": 1}})
    assert "hf_x" in to_yaml(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config, redacted=True))
    assert "hf_x" not in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml").train == {"seed": 1}
    assert load_config(tmp_path / "config.yaml", train={"hub_token": "hf_y"}).train == {"seed": 1, "hub_token": "hf_y"}


def test_configuration_errors_show_no_secret(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: d\ntrain: {hub_token: s3cretvalue [}\n")
    with pytest.raises(UsageError, match="line 2") as broken:
        load_config(path)
    with pytest.raises(UsageError) as unparsed:
        parse_settings(["hub_token=[s3cretvalue"])
    with pytest.raises(UsageError) as unassigned:
        parse_settings(["hf_" + "aB3" * 11])
    for error in (broken, unparsed, unassigned):
        assert "s3cretvalue" not in str(error.value)
        assert "aB3" not in str(error.value)


def test_env_shows_no_secret():
    secret = "hf_" + "aB3" * 11
    shown = {
        "FTDATA_CACHE": f"/tmp/{secret}",
        "HF_ENDPOINT": f"https://me:{secret}@host",
        "HF_TOKEN": "longsecretvalue",
        "HF_HOME": "/x/longsecretvalue",
    }
    done = subprocess.run(
        [sys.executable, "-m", "ftdata", "env"], env={**os.environ, **shown}, capture_output=True, text=True, check=True
    )
    assert "aB3" not in done.stdout
    assert "longsecretvalue" not in done.stdout


def test_build_with_a_secret_in_its_manifest_is_not_pushed(tmp_path):
    (tmp_path / "manifest.json").write_text(
        json.dumps({"options": {"data": ["d.json"], "columns": {"password": "pw"}}})
    )
    _check_secrets(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"options": {"data": ["https://me:pw@host/d.json"]}}))
    with pytest.raises(InputRefused, match="contains a secret") as refused:
        _check_secrets(tmp_path)
    assert "me:pw" not in str(refused.value)
