"""Errors in user code and arguments of unexpected types give clear errors."""

import json

import pytest

import ftdata
from ftdata import build_sft_dataset
from ftdata.errors import BadRow, FtdataError, UsageError
from ftdata.pipeline.mask import masks
from ftdata.schemas import Schema, schemas

ROW = {"question": "Why?", "answer": "So."}


def test_failing_mask_policy_is_named(tokenizer_dir):
    with pytest.raises(UsageError, match=r"mask_failed.*<memory>\[0\].*ZeroDivisionError"):
        build_sft_dataset(
            [ROW], tokenizer_dir("tiny_bpe"), train_on=lambda rendered, _: [1 / 0 for _ in rendered.spans]
        )


def test_schema_with_a_failing_match_is_named(tokenizer_dir, monkeypatch):
    monkeypatch.setattr(schemas, "_registered", schemas.registered())
    schemas.register("mine")(Schema(("a",), lambda row: row["nothing"], lambda row: row))
    with pytest.raises(FtdataError, match=r"schema_failed.*the matches function of schema mine raised KeyError"):
        build_sft_dataset([ROW], tokenizer_dir("tiny_bpe"))


def test_plugin_that_cannot_be_imported_is_named(monkeypatch):
    from importlib.metadata import EntryPoint

    point = EntryPoint("mine", "no_such_package:policy", masks.group)
    monkeypatch.setattr("ftdata.registry.entry_points", lambda **_: [point])
    with pytest.raises(UsageError, match=r"plugin_failed.*no_such_package:policy.*ModuleNotFoundError"):
        masks.get("mine")


@pytest.mark.parametrize(
    "call",
    [
        lambda _: list(ftdata.read(b"abc")),
        lambda _: ftdata.check_template(None),
        lambda _: ftdata.check_template(3),
        lambda _: ftdata.verify(3),
        lambda _: ftdata.preview([ROW], grep=3),
        lambda folder: ftdata.audit([ROW], folder, ignore=3),
        lambda folder: ftdata.audit([ROW], folder, near_duplicate_threshold=True),
        lambda folder: build_sft_dataset([ROW], folder, dedup=True, near_duplicate_threshold=True),
        lambda folder: build_sft_dataset([ROW], folder, limit=True),
    ],
)
def test_arguments_of_wrong_types_are_refused(call, tokenizer_dir):
    with pytest.raises(UsageError):
        call(tokenizer_dir("tiny_bpe"))


def test_id_may_be_a_number():
    shown = str(ftdata.preview([{**ROW, "id": 3}, {"question": "Else?", "answer": "No.", "id": 4}], id=4))
    assert "Else?" in shown
    assert "Why?" not in shown


def test_without_a_home_directory_nothing_is_cached(monkeypatch, tmp_path):
    from ftdata.storage import disk

    monkeypatch.delenv("FTDATA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert disk.cache_root() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk.cache_root() == tmp_path / "ftdata"
    monkeypatch.setenv("FTDATA_CACHE", "off")
    assert disk.cache_root() is None
    ftdata.check_template("{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("manifest", ["not json", "[]", "{}", '{"files": 3}', '{"files": [1]}'])
def test_damaged_manifest_on_the_hub_is_ignored(manifest, tmp_path):
    from ftdata.build.push import _list_old_files

    (tmp_path / "manifest.json").write_text(manifest)

    class Api:
        def hf_hub_download(self, *_, **__):
            return tmp_path / "manifest.json"

    assert list(_list_old_files(Api(), "me/chats")) == []


@pytest.mark.train
def test_truncated_sample_line_is_removed_when_training_resumes(tmp_path):
    pytest.importorskip("trl")
    from types import SimpleNamespace

    from ftdata.train.runs.callbacks import SampleCallback

    path, whole = tmp_path / "samples.jsonl", json.dumps({"step": 2, "answer": "é"}, ensure_ascii=False) + "\n"
    later = json.dumps({"step": 9, "answer": "later"}) + "\n"
    for cut in range(len(later)):
        path.write_text(whole + later[:cut])
        SampleCallback([], [], [], None, path, None).on_train_begin(None, SimpleNamespace(global_step=5), None)
        assert path.read_text() == whole


def test_rejects_of_a_custom_reader_are_counted(tmp_path, tokenizer_dir):
    (tmp_path / "mine.py").write_text(
        "from ftdata.types import Reject, Row, Source\n"
        "def read(file):\n"
        "    yield Row({'question': 'a', 'answer': 'b'}, Source(file.path, 0))\n"
        "    yield Reject(Source(file.path, 1), 'odd', '', 'is odd')\n"
    )
    (tmp_path / "a.log").write_text("x")
    spec = {"path": str(tmp_path / "a.log"), "format": f"{tmp_path}/mine.py:read"}
    report = build_sft_dataset(spec, tokenizer_dir("tiny_bpe"), on_bad_rows="quarantine", max_rejects=1).report
    assert "2 read = 1 built + 1 rejected" in str(report)
    with pytest.raises(BadRow, match="odd"):
        list(ftdata.read(spec))


def test_unknown_message_keys_are_named(tokenizer_dir):
    row = {"messages": [{"who": "customer", "says": "Hi"}]}
    with pytest.raises(FtdataError, match=r"has the keys 'who', 'says'.*rename the keys to role and content"):
        build_sft_dataset([row], tokenizer_dir("tiny_bpe"))


def test_null_column_is_named(tokenizer_dir):
    with pytest.raises(FtdataError, match="missing_column.*answer is null, expected text"):
        build_sft_dataset([{"question": "Why?", "answer": None}], tokenizer_dir("tiny_bpe"))


@pytest.mark.train
def test_replaced_build_is_not_used_for_evaluation(llama, tmp_path):
    pytest.importorskip("trl")
    from ftdata.build.dataset import write_build
    from ftdata.train import compare, run

    rows = [{"question": f"{n}?", "answer": f"{n}."} for n in range(8)]
    write_build(rows, llama, tmp_path / "built", test_size=2)
    settings = {"max_steps": 1, "report_to": "none"}
    done = run(tmp_path / "built", model=llama, output_dir=tmp_path / "run", lora_r=2, settings=settings)
    assert "test split" in compare(done, n=1, max_new_tokens=2).data_name
    write_build(rows, llama, tmp_path / "built", overwrite=True)
    with pytest.raises(FtdataError, match=r"data_differs.*has changed since .* was trained on it"):
        compare(done, n=1, max_new_tokens=2)
