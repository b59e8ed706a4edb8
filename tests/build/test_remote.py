"""Builds in an object store: the same bytes as local builds, complete or absent, and never overwritten."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
import warm
from cases import long
from hub.bucket import serving

from ftdata import build_sft_dataset, preview, verify
from ftdata.build import remote, store
from ftdata.build.dataset import write_build
from ftdata.errors import HubError, InputRefused, UsageError
from ftdata.readers import file_parts, remote_files
from ftdata.readers.sources import resolve_sources

pytestmark = pytest.mark.slow

ROWS = [{"question": f"what is {n}?", "answer": f"it is {n * n}"} for n in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    monkeypatch.setattr(remote_files, "PAUSE", 0.01)
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path / "cache"))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serving() as server:
        put("in/a.jsonl", LINES)
        yield server


def put(path, data):
    fsspec.filesystem("s3").pipe(f"data/{path}", data)


def objects(folder):
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    return {name.removeprefix(f"data/{folder}/"): store.cat(name) for name in store.find(f"data/{folder}")}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sent(bucket):
    return [said for said in bucket.asked if said.startswith(("PUT", "POST"))]


def ftdata(*arguments):
    done = subprocess.run(warm.python("-m", "ftdata", *arguments), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.long)])
def test_network_failures_give_all_rows_or_an_error(count):
    """No partial data is accepted, the number of requests is bounded, and the error names the source."""
    driver = Path(__file__).parents[1] / "schedules.py"
    done = subprocess.run([sys.executable, driver, str(count)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["schedules"] == count


@pytest.fixture
def build(tokenizer_dir):
    def write(data, target, **options):
        return write_build(data, tokenizer_dir("tiny_bpe"), target, **options)

    return write


def test_remote_build_equals_a_local_build(bucket, build, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    build(str(tmp_path / "a.jsonl"), str(tmp_path / "out"))
    build(str(tmp_path / "a.jsonl"), "s3://data/out/")
    assert objects("out") == files(tmp_path / "out")
    assert list((tmp_path / "cache" / "builds").iterdir()) == []
    assert bucket.asked.index("PUT /data/out/manifest.json") > max(
        number for number, said in enumerate(bucket.asked) if said.startswith("PUT /data/out/train")
    )


def test_remote_files_are_read_in_parts(bucket, build, tmp_path, monkeypatch):
    whole = build("s3://data/in/a.jsonl", str(tmp_path / "whole"))
    monkeypatch.setattr(file_parts, "PART", 5000)
    assert len(file_parts.split_into_parts(resolve_sources("s3://data/in"))) == len(LINES) // 5000
    monkeypatch.setenv("FTDATA_CACHE", "off")
    assert build("s3://data/in", str(tmp_path / "parts")).totals == whole.totals
    same = {path for path in files(tmp_path / "whole") if path.endswith(".arrow")}
    assert {path: files(tmp_path / "parts")[path] for path in same} == {
        path: files(tmp_path / "whole")[path] for path in same
    }


def test_finished_remote_build_is_reused_and_not_overwritten(bucket, build):
    first = build("s3://data/in", "s3://data/out")
    before, bucket.asked[:] = objects("out"), []
    again = build("s3://data/in", "s3://data/out")
    assert (again.totals, again.encoder, sent(bucket)) == (first.totals, "", [])
    put("in/a.jsonl", LINES.replace(b"what", b"then"))
    with pytest.raises(UsageError, match=r"s3://data/out: the URL contains another build"):
        build("s3://data/in", "s3://data/out")
    assert (objects("out"), sent(bucket)) == (before, ["PUT /data/in/a.jsonl"])
    with pytest.raises(UsageError, match=r"s3://data/in: the URL contains files that are not a build: a.jsonl"):
        build("s3://data/in", "s3://data/in")
    for place in ("http://example.org/x", "hf://datasets/me/x", "file:///tmp/x"):
        with pytest.raises(UsageError, match=f"output_url.*builds cannot be written to {place}"):
            build("s3://data/in", place)


def test_interrupted_upload_resumes(bucket, build):
    bucket.faults += [("PUT /data/out/.*arrow", 503)] * 99
    with pytest.raises(HubError, match=r"s3://data/out/train/data-00000.arrow: .*503"):
        build("s3://data/in", "s3://data/out")
    there = objects("out")
    assert "manifest.json" not in there
    assert there
    with pytest.raises(InputRefused, match="not a data set that ftdata built"):
        verify("s3://data/out")
    bucket.faults, bucket.asked[:] = [("PUT /data/out/.*arrow", 503), ("GET .*", "cut")], []
    build("s3://data/in", "s3://data/out")
    assert verify("s3://data/out") == []
    assert not [said for said in sent(bucket) if said.partition("/out/")[2] in there]


def test_foreign_remote_files_are_not_overwritten(bucket, build):
    put("mine/README.md", b"my notes")
    put("mine/train/data-00000.arrow", b"mine")
    before = objects("mine")
    with pytest.raises(
        UsageError,
        match=r"s3://data/mine: the URL contains files that are not a build: README.md, train/data-00000.arrow",
    ):
        build("s3://data/in", "s3://data/mine")
    assert objects("mine") == before


def test_concurrent_upload_of_another_build_is_refused(bucket, build, monkeypatch, tmp_path):
    """The second build runs on another machine that shares only the output location."""
    put("in/b.jsonl", LINES[: LINES.index(b"\n") + 1] * 9)
    missing = remote.missing_files

    def meanwhile(*asked):
        monkeypatch.setattr(remote, "missing_files", missing)
        monkeypatch.setenv("FTDATA_CACHE", str(tmp_path / "other"))
        with pytest.raises(UsageError, match="the unfinished upload of another build"):
            build("s3://data/in/b.jsonl", "s3://data/out")
        monkeypatch.setenv("FTDATA_CACHE", str(tmp_path / "cache"))
        return missing(*asked)

    monkeypatch.setattr(remote, "missing_files", meanwhile)
    build("s3://data/in/a.jsonl", "s3://data/out")
    assert verify("s3://data/out") == []
    assert "ftdata-upload" not in objects("out")


@pytest.mark.parametrize("name", ["../x", "/tmp/x", long("a/../../x"), "", long("."), long("train/./x")])
def test_downloaded_files_stay_in_their_folder(bucket, tmp_path, name):
    (tmp_path / "made").mkdir()
    (tmp_path / "x").write_text("mine")
    store.write_manifest(tmp_path / "made", {"fingerprint": ""}, [])
    found = json.loads((tmp_path / "made" / "manifest.json").read_text())
    found["files"][name] = {"bytes": 1, "sha256": "0"}
    found.pop("sha256")
    put("evil/manifest.json", store._encode_manifest(found))
    put("evil/dataset_dict.json", b"{}")
    with pytest.raises(InputRefused, match="damaged_build"):
        preview("s3://data/evil")
    assert not list((tmp_path / "cache").rglob("*x"))


def test_remote_builds_are_downloaded_and_verified(bucket, build, tokenizer_dir, tmp_path):
    loaded = build_sft_dataset("s3://data/in", tokenizer_dir("tiny_bpe"), output_dir="s3://data/out")
    assert len(loaded["train"]) == 300
    assert "it is 81" in str(preview("s3://data/out", tokenizer_dir("tiny_bpe"), n=10))
    assert ftdata("verify", "s3://data/out") == (0, "intact   s3://data/out\n", "")
    arrow = next(iter(fsspec.filesystem("s3").glob("data/out/train/*.arrow")))
    data = fsspec.filesystem("s3").cat(arrow)
    put(arrow.removeprefix("data/"), data[:999] + bytes([data[999] ^ 1]) + data[1000:])
    assert ftdata("verify", "s3://data/out") == (1, "damaged  s3://data/out/train/data-00000.arrow\n", "")
    for one in (tmp_path / "cache" / "builds").iterdir():
        one.rename(tmp_path / "elsewhere")
    with pytest.raises(
        InputRefused, match=r"the build at s3://data/out has missing or damaged files: train/data-00000.arrow"
    ):
        preview("s3://data/out", tokenizer_dir("tiny_bpe"))
    assert not list((tmp_path / "cache" / "builds").iterdir())


def test_missing_credentials_fail_without_retries(monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(remote_files, "PAUSE", 1000)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(HubError, match=r"credentials\] s3://nowhere/a.jsonl"):
        resolve_sources("s3://nowhere/a.jsonl")
