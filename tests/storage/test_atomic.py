"""The workspace and the output folder may come from an untrusted repository."""

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from cases import long

from ftdata import build_sft_dataset, verify
from ftdata.build.dataset import write_build
from ftdata.errors import StorageError, UsageError
from ftdata.storage.atomic import check_no_links

ROWS = [{"question": f"What is {n} + {n}?", "answer": f"{2 * n}"} for n in range(20)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def private(tmp_path):
    """A folder with private files, most of them hidden."""
    folder = tmp_path / "home"
    (folder / ".ssh").mkdir(parents=True)
    for name in (".ssh/id_ed25519", ".netrc", ".data-0123abcd.tmp", "letter.txt"):
        (folder / name).write_text("precious")
    return folder


def content(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("link", ["shards", "new", "old", "shards/0123", "new/train", "token", "lock", "."])
def test_links_in_the_workspace_are_refused(link, data, private, tokenizer_dir, tmp_path):
    before = content(private)
    place = tmp_path / ".built.ftdata" / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(private)
    with pytest.raises(StorageError, match="workspace_link") as caught:
        write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / "built", template="chatml")
    assert str(tmp_path / ".built.ftdata") in caught.value.message
    assert content(private) == before
    assert place.is_symlink()


def test_link_in_the_target_is_not_replaced(data, private, tokenizer_dir, tmp_path):
    write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / "built", template="chatml")
    (tmp_path / "built" / "more").symlink_to(private)
    before = content(private)
    with pytest.raises(UsageError, match="more"):
        write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / "built", template="zephyr")
    assert content(private) == before


def test_link_in_place_of_a_file_is_damage(data, tokenizer_dir, tmp_path):
    write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / "built", template="chatml")
    file = tmp_path / "built" / "report.json"
    file.rename(tmp_path / "moved.json")
    file.symlink_to(tmp_path / "moved.json")
    assert verify(tmp_path / "built") == ["report.json"]


def test_workspace_of_another_user_is_refused(data, tokenizer_dir, tmp_path, monkeypatch):
    (tmp_path / ".built.ftdata").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(StorageError, match="workspace_owner.*uid"):
        write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / "built", template="chatml")


@pytest.mark.parametrize(
    "name", ["notes.txt", "shards/.hidden", "new/thesis.tex", "shards/abc/thesis.tex", "old/manifest.json"]
)
def test_foreign_files_in_the_workspace_are_kept(name, data, tokenizer_dir, tmp_path):
    file = tmp_path / ".built.ftdata" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious")
    with pytest.raises(StorageError, match="workspace_unknown"):
        write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / "built", template="chatml")
    assert file.read_text() == "precious"


def forge_arrow(path):
    """Replace the labels of a build."""
    with pa.OSFile(str(path), "rb") as file:
        table = pa.ipc.open_stream(file).read_all()
    labels = [[0] * len(ids) for ids in table["input_ids"].to_pylist()]
    forged = table.set_column(1, table.schema.field(1), pa.array(labels, table.schema.field(1).type))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, forged.schema) as writer:
        writer.write_table(forged)


def labels_of(folder):
    with pa.OSFile(str(next((folder / "train").glob("*.arrow"))), "rb") as file:
        return pa.ipc.open_stream(file).read_all()["labels"].to_pylist()


def test_forged_build_is_not_reused(data, tokenizer_dir, tmp_path, monkeypatch):
    """An untrusted `built/` next to the data has valid hashes, but other labels."""
    from ftdata.build import store
    from ftdata.storage import disk

    target = tmp_path / "built"
    options = {"template": "chatml"}
    write_build(data, tokenizer_dir("tiny_bpe"), target, **options)
    honest = labels_of(target)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "stranger"))
    forge_arrow(next((target / "train").glob("*.arrow")))
    manifest = store.read_manifest(target)
    (target / "manifest.json").unlink()
    files = manifest.pop("files")
    manifest.pop("format")
    store.write_manifest(target, manifest, [])
    assert store.read_manifest(target)["files"].keys() == files.keys()
    assert verify(target) == []
    assert labels_of(target) != honest
    assert disk.sha256_of_file(target / "manifest.json")
    monkeypatch.undo()
    write_build(data, tokenizer_dir("tiny_bpe"), target, **options)
    assert labels_of(target) == honest


def test_recorded_build_is_reused(data, tokenizer_dir, tmp_path):
    target = tmp_path / "built"
    write_build(data, tokenizer_dir("tiny_bpe"), target, template="chatml")
    before = (target / "manifest.json").stat().st_ino
    write_build(data, tokenizer_dir("tiny_bpe"), target, template="chatml")
    assert (target / "manifest.json").stat().st_ino == before


def test_forged_shards_are_not_reused(data, tokenizer_dir, tmp_path, monkeypatch):
    """An untrusted workspace contains a sealed shard of the same data, with another mask."""
    from ftdata.build import pack_files
    from ftdata.storage import atomic, disk

    target = tmp_path / "built"

    def interrupted(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(pack_files, "write_packs", interrupted)
    with pytest.raises(StorageError):
        write_build(data, tokenizer_dir("tiny_bpe"), target, template="chatml")
    monkeypatch.undo()
    (shard,) = (tmp_path / ".built.ftdata" / "shards").iterdir()
    result = json.loads((shard / "result.json").read_bytes())["result"]
    (shard / "result.json").unlink()
    trained = shard / "trained.b8"
    trained.write_bytes(b"\1" * trained.stat().st_size)
    atomic.seal_folder(shard, result)
    assert atomic.read_sealed(shard) is not None
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "victim"))
    write_build(data, tokenizer_dir("tiny_bpe"), target, template="chatml")
    assert any(-100 in labels for labels in labels_of(target))
    assert disk.sha256_of_file(target / "manifest.json")


@pytest.mark.parametrize("unusable", ["no home", "read-only", "open to all"])
def test_without_records_every_build_is_repeated(unusable, data, tokenizer_dir, tmp_path, monkeypatch):
    state = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    if unusable == "no home":
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    elif unusable == "read-only":
        state.write_text("a file")
    else:
        (state / "ftdata" / "records").mkdir(parents=True)
        (state / "ftdata" / "records").chmod(0o777)
    target = tmp_path / "built"
    write_build(data, tokenizer_dir("tiny_bpe"), target, template="chatml")
    before = (target / "manifest.json").stat().st_ino
    write_build(data, tokenizer_dir("tiny_bpe"), target, template="chatml")
    assert (target / "manifest.json").stat().st_ino != before
    assert verify(target) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [400, long(1200)])
def test_more_sources_than_open_files_are_built(tokenizer_dir, tmp_path, count):
    """Source files with a limit of 256 open files; each pack contains examples of many files."""
    folder = tmp_path / "many"
    folder.mkdir()
    for n in range(count):
        (folder / f"{n:04d}.jsonl").write_text(json.dumps({"question": f"What is {n}?", "answer": f"{n}"}) + "\n")
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
        "from ftdata.build.dataset import write_build\n"
        "report = write_build(sys.argv[1], sys.argv[2], sys.argv[3], template='chatml', max_length=512, packing='bfd', test_size=9)\n"
        "print(report.totals['built'])"
    )
    given = str(folder / "*.jsonl"), tokenizer_dir("tiny_bpe"), str(tmp_path / "built")
    ran = subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True, check=False)
    assert ran.stdout == f"{count}\n", ran.stderr
    assert verify(tmp_path / "built") == []
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 256
    alone = tmp_path / "one.jsonl"
    alone.write_text("".join(path.read_text() for path in sorted(folder.iterdir())))
    report = write_build(
        str(alone),
        tokenizer_dir("tiny_bpe"),
        tmp_path / "same",
        template="chatml",
        max_length=512,
        packing="bfd",
        test_size=9,
    )
    assert report.totals["built"] == count
    data = [next((tmp_path / name / "train").glob("*.arrow")).read_bytes() for name in ("built", "same")]
    assert data[0] == data[1]
    shutil.rmtree(folder)
    assert len(build_sft_dataset(str(alone), tokenizer_dir("tiny_bpe"), "chatml")["train"]) == count


def test_folders_may_disappear_while_links_are_searched(tmp_path):
    """A waiting build looks for links while the build that holds the lock removes folders."""
    folders = [tmp_path / "work" / str(number) for number in range(50)]
    is_done = threading.Event()

    def make_and_remove():
        while not is_done.is_set():
            for folder in folders:
                folder.mkdir(parents=True)
            for folder in folders:
                folder.rmdir()

    thread = threading.Thread(target=make_and_remove)
    thread.start()
    try:
        for _ in range(300):
            check_no_links(tmp_path)
    finally:
        is_done.set()
        thread.join()
