"""The hub, simulated on localhost: reading, streaming, tokenizers, pushes and network failures."""

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import warm
from cases import long
from hub.server import serving

from ftdata import read
from ftdata.errors import HubError, InputRefused, UsageError
from ftdata.readers import remote_files

pytestmark = pytest.mark.slow

ROWS = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(40)]
QUICK = (
    "import time, ftdata.readers.remote_files as remote; remote.PAUSE = 0.01\n"
    "sleep = time.sleep; time.sleep = lambda seconds: sleep(seconds / 50)\n"  # pauses of the client between retries
)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A hub, and the variables that its client reads when it is imported."""
    home = {"HF_HOME": str(tmp_path_factory.mktemp("hub") / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
    with serving() as (server, address):
        yield server, {"HF_ENDPOINT": address, **home}


@pytest.fixture
def hub(served, monkeypatch):
    """A hub without repositories, requests and faults, and with an empty cache."""
    server, variables = served
    server.clear()
    shutil.rmtree(variables["HF_HOME"], ignore_errors=True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return server


def python(code):
    """Run code in a process whose client of the hub read the endpoint when it was imported."""
    done = subprocess.run(
        warm.python("-c", QUICK + code, modules=warm.HUB), capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rows_of(data):
    """Return the questions of a source by split."""
    return python(
        "import json\nfrom ftdata.readers import resolve_sources\nfound = {}\n"
        f"for source in resolve_sources({data!r}):\n"
        "    found.setdefault(source.split, []).extend(row.data['question'] for row in source.rows())\n"
        "print(json.dumps(found))"
    )


def refusal(data):
    return python(
        "import json\nfrom ftdata import read\nfrom ftdata.errors import FtdataError\n"
        f"try:\n    list(read({data!r}))\nexcept FtdataError as error:\n"
        "    print(json.dumps([error.code, error.exit_code, str(error)]))"
    )


QUESTIONS = [row["question"] for row in ROWS]


@pytest.mark.parametrize("place", ["me/chats", long("hf://me/chats"), "hf://datasets/me/chats"])
def test_splits_are_detected_from_file_names(hub, place):
    hub.add("me/chats", {
        "README.md": "about", "data/train-00000-of-00002.jsonl": lines(ROWS[:10]), "data/train-00001-of-00002.jsonl.gz": gzip.compress(lines(ROWS[10:20]).encode()),
        "data/test.csv": "question,answer\nq20,a20\n", "val.json": json.dumps(ROWS[30:]),
    })  # fmt: skip
    assert rows_of(place) == {"test": ["q20"], "train": QUESTIONS[:20], "validation": QUESTIONS[30:]}
    assert rows_of({"path": place, "split": "test"}) == {"test": ["q20"]}
    assert rows_of({"path": place, "data_files": "data/train-*"}) == {"train": QUESTIONS[:20]}
    assert rows_of({"path": place, "data_files": {"a": "val.json", "b": ["data/test.csv"]}}) == {
        "a": QUESTIONS[30:],
        "b": ["q20"],
    }
    assert rows_of("hf://me/chats/data/test.csv") == {"train": ["q20"]}


def test_configurations_are_read_from_the_dataset_card(hub):
    card = "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: s/*.jsonl\n- config_name: large\n  default: true\n  data_files: l.jsonl\n---\n"
    hub.add("me/two", {"README.md": card, "s/a.jsonl": lines(ROWS[:2]), "l.jsonl": lines(ROWS)})
    assert rows_of("me/two") == {"train": QUESTIONS}
    assert rows_of({"path": "me/two", "name": "small"}) == {"train": QUESTIONS[:2]}
    code, status, text = refusal({"path": "me/two", "name": "smal"})
    assert (code, status) == ("hub_config", 2)
    assert "did you mean 'small'" in text


def test_each_hub_file_is_used_once_and_in_its_split(hub):
    cards = {2: "---\nconfigs:\n- {config_name: en, data_dir: en}\n- {config_name: fr, data_dir: fr}\n---\n"}
    cases = [
        (["a/training-set/test.jsonl", "eval_data/train.jsonl"], {}, {"test": ["a/training-set/test.jsonl"], "train": ["eval_data/train.jsonl"]}),
        (["data/train-0.jsonl", "examples/sample.jsonl", "config.json"], {}, {"train": ["data/train-0.jsonl"]}),
        (["en/a.jsonl", "fr/a.jsonl"], {"name": "en"}, {"train": ["en/a.jsonl"]}),
        (["data/a.jsonl", "data/b.md"], {"data_files": ["data/*", "data/a.jsonl"]}, {"train": ["data/a.jsonl"]}),
        (["data/a.jsonl", "x.jsonl"], {"data_files": "data"}, {"train": ["data/a.jsonl"]}),
        (["a.jsonl"], {"data_files": [{"path": "a.jsonl"}]}, {"train": ["a.jsonl"]}),
        (["train.v1.jsonl", "train.v2.jsonl"], {}, {"train": ["train.v1.jsonl", "train.v2.jsonl"]}),
        (["train.jsonl.gz", "train.csv"], {}, "hub_formats"),
        (["a.jsonl"], {"data_files": 5}, "data_files"),
        (["a.jsonl"], {"data_files": {"train": None}}, "data_files"),
        (["a.jsonl"], {"name": "en"}, "hub_config"),
    ]  # fmt: skip
    for number, (files, _, _) in enumerate(cases):
        hub.add(f"o/n{number}", dict.fromkeys(files, "x") | ({"README.md": cards[number]} if number in cards else {}))
    specs = [{"path": f"o/n{number}", **spec} for number, (_, spec, _) in enumerate(cases)]
    found = python(f"""
import json
from ftdata.errors import UsageError
from ftdata.readers import resolve_sources
found = []
for spec in {specs!r}:
    try:
        splits = {{}}
        for one in resolve_sources(spec):
            splits.setdefault(one.split, []).append(one.path.split("@")[1].partition("/")[2])
        found.append(splits)
    except UsageError as error:
        found.append(error.code)
print(json.dumps(found))""")
    assert found == [expected for _, _, expected in cases]


def test_one_commit_is_read_and_downloaded_once(hub):
    hub.add("me/chats", {"train.jsonl": lines(ROWS)})
    commit = hub.commit(("datasets", "me/chats"))
    found = python(
        "import json\nfrom ftdata import read\nrows = list(read('me/chats'))\nprint(json.dumps([str(rows[0].source), len(rows)]))"
    )
    assert found == [f"hf://datasets/me/chats@{commit}/train.jsonl:1", 40]
    bodies = [path for method, path in hub.asked if method == "GET" and "resolve" in path]
    assert bodies == [f"/datasets/me/chats/resolve/{commit}/train.jsonl"]
    rows_of("me/chats")
    assert [path for method, path in hub.asked if method == "GET" and "resolve" in path] == bodies
    assert rows_of({"path": "me/chats", "revision": commit}) == {"train": QUESTIONS}


def test_streaming_reads_without_a_download(hub, tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "t.parquet")
    hub.add("me/chats", {"train.jsonl": lines(ROWS), "test.parquet": (tmp_path / "t.parquet").read_bytes()})
    assert rows_of({"path": "me/chats", "streaming": True}) == {"test": QUESTIONS, "train": QUESTIONS}
    assert not list(Path(os.environ["HF_HOME"]).rglob("*.jsonl"))


@pytest.mark.parametrize(
    ("fault", "streaming"),
    [
        (503, True),
        (429, False),
        ("cut", True),
        *map(long, (503, 429, 500, 500, "cut"), (False, True, False, True, False)),
    ],
)
def test_transient_errors_are_retried(hub, fault, streaming):
    hub.add("me/chats", {"train.jsonl": lines(ROWS * 50)})
    hub.faults += [(r"resolve/.*\.jsonl", fault)] * 2
    if fault != "cut":
        hub.faults.append((r"^/api/datasets", fault))
    assert rows_of({"path": "me/chats", "streaming": streaming}) == {"train": QUESTIONS * 50}
    assert hub.faults == []


def test_unavailable_hub_gives_exit_code_six(hub):
    hub.add("me/chats", {"train.jsonl": lines(ROWS)})
    hub.faults += [(r"resolve/.*\.jsonl", 503)] * 99
    code, status, text = refusal("me/chats")
    assert (code, status) == ("hub", 6)
    assert "train.jsonl" in text
    assert "503" in text


@pytest.mark.parametrize(
    ("place", "code", "status", "says"),
    [
        ("me/nothing", "hub", 6, "404"),
        ({"path": "me/chats", "split": "tset"}, "no_split", 2, "train"),
        ({"path": "me/chats", "data_files": "trian.jsonl"}, "file_not_found", 2, "did you mean 'train.jsonl'"),
        ("me/code", "hub_no_data", 3, "never run"),
        ({"path": "data.jsonl", "revision": "x"}, "hub_only", 2, "not on the Hub"),
    ],
)
def test_missing_hub_data_is_named(hub, place, code, status, says):
    hub.add("me/chats", {"train.jsonl": lines(ROWS)})
    hub.add("me/code", {"code.py": "import os"})
    found = refusal(place)
    assert found[:2] == [code, status]
    assert says in found[2]


def test_file_changed_during_a_download_is_not_mixed(hub):
    hub.add("me/chats", {"train.jsonl": lines(ROWS * 50)})
    hub.faults += [(r"resolve/.*\.jsonl", "etag")]
    assert rows_of("me/chats") == {"train": QUESTIONS * 50}


def test_tokenizers_come_from_the_hub(hub, tokenizer_dir):
    folder = Path(tokenizer_dir("tiny_bpe"))
    hub.add("me/model", {path.name: path.read_bytes() for path in folder.iterdir()}, kind="models")
    hub.faults += [(r"resolve/.*/tokenizer.json", 503)] * 2
    code = f"""
import json
from ftdata import encode
talk = [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "a"}}]
print(json.dumps([encode(talk, name)[0].input_ids.tolist() for name in ("me/model", {str(folder)!r})]))"""
    ours, theirs = python(code)
    assert ours == theirs


def test_pushed_build_is_complete_and_can_be_read_back(hub, tokenizer_dir, tmp_path):
    (tmp_path / "d.jsonl").write_text(lines(ROWS))
    python(f"""
import json
from ftdata import build_sft_dataset
build_sft_dataset({str(tmp_path / "d.jsonl")!r}, {tokenizer_dir("tiny_bpe")!r}, test_size=4, output_dir={str(tmp_path / "out")!r})
print(json.dumps(0))""")
    command = warm.python("-m", "ftdata", "push", tmp_path / "out", "me/built", "--private", modules=warm.HUB)
    hub.faults.append((r"/commit/", 503))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    files = hub.repos["datasets", "me/built"]
    assert {name: len(data) for name, data in files.items() if name != ".gitattributes"} == {
        str(path.relative_to(tmp_path / "out")): path.stat().st_size
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    card = files["README.md"].decode()
    for fact in (
        f"{tmp_path / 'd.jsonl'}: 40 rows",
        "trained on",
        "assistant",
        "40 read = 40 built",
        "ftdata build",
        "--test-size 4",
    ):
        assert fact in card
    found = python(
        "import json, datasets\nloaded = datasets.load_dataset('me/built')\n"
        "print(json.dumps({name: [len(split), split.column_names] for name, split in loaded.items()}))"
    )
    assert found == {
        name: [size, ["input_ids", "labels", "seq_lengths"]] for name, size in (("train", 36), ("test", 4))
    }
    earlier = json.loads(files["manifest.json"])
    earlier["files"]["train/data-00001.arrow"] = {}
    more = {
        "manifest.json": json.dumps(earlier).encode(),
        "train/data-00001.arrow": b"of a larger build",
        "raw/state.json": b"{}",
    }
    files.update(more)
    python(f"""
import json
from ftdata import build_sft_dataset
build_sft_dataset({str(tmp_path / "d.jsonl")!r}, {tokenizer_dir("tiny_bpe")!r}, limit=5, overwrite=True, output_dir={str(tmp_path / "out")!r})
print(json.dumps(0))""")
    subprocess.run(command, check=True, env=os.environ, capture_output=True)
    assert sorted(name for name in files if name.endswith(".arrow")) == ["train/data-00000.arrow"]
    assert "raw/state.json" in files
    (tmp_path / "out" / "train" / "data-00000.arrow").write_bytes(b"")
    assert subprocess.run(command, capture_output=True, check=False, env=os.environ).returncode == 3


def test_patterns_stay_in_their_folder_and_a_lost_network_gives_exit_code_six(hub, monkeypatch):
    hub.add("me/chats", {"data/a.jsonl": lines(ROWS[:1]), "data/deep/b.jsonl": lines(ROWS[1:2])})
    assert rows_of({"path": "me/chats", "data_files": "data/*.jsonl"}) == {"train": QUESTIONS[:1]}
    assert rows_of({"path": "me/chats", "data_files": "data/**/*.jsonl"}) == {"train": QUESTIONS[:2]}
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert refusal("me/chats")[:2] == ["hub", 6]


MANY_TIMES = 2000
MANY = lines(ROWS * MANY_TIMES)
"""A file that is read in several parts."""


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setattr(remote_files, "PAUSE", 0.01)
    with serving() as (server, address):
        yield server, address


def questions(url):
    return [row.data["question"] for row in read(url)]


@pytest.mark.parametrize("where", ["files", "whole", "plain"])
@pytest.mark.parametrize(
    ("fault", "packed"),
    [
        (None, True),
        (503, False),
        ("cut", True),
        long(None, False),
        long(503, True),
        long("cut", False),
        long(429, False),
        long(429, True),
    ],
)
def test_interrupted_download_resumes(web, where, fault, packed):
    server, address = web
    name = "chats.jsonl.gz" if packed else "chats.jsonl"
    server.files[name] = gzip.compress(MANY.encode()) if packed else MANY.encode()
    server.faults += [(f"/{where}/", fault)] * 3
    assert questions(f"{address}/{where}/{name}?signed=1") == QUESTIONS * MANY_TIMES
    assert server.faults == []


def test_remote_parquet_is_read_with_range_requests(web, tmp_path):
    server, address = web
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    server.files["t.parquet"] = (tmp_path / "t.parquet").read_bytes()
    server.faults += [("/files/", 503), ("/files/", "cut")]
    assert questions(f"{address}/files/t.parquet") == QUESTIONS
    with pytest.raises(InputRefused, match="not_seekable"):
        questions(f"{address}/whole/t.parquet")


def test_remote_file_that_changes_is_refused(web):
    server, address = web
    server.files["chats.jsonl"] = MANY.encode()
    server.faults += [("/files/", None)] * 3 + [("/files/", "other")]
    with pytest.raises(InputRefused, match=r"file_changed.*chats.jsonl"):
        list(read(f"{address}/files/chats.jsonl"))


def test_web_errors_are_reported(web):
    server, address = web
    server.files["chats.jsonl"] = b"{}"
    with pytest.raises(UsageError, match="other.jsonl: the file does not exist"):
        questions(f"{address}/files/other.jsonl")
    for status, tries in ((403, 2), (503, 20)):
        server.faults = [("/files/", status)] * tries
        with pytest.raises(HubError, match=f"chats.jsonl: the server answered with status {status}"):
            questions(f"{address}/files/chats.jsonl")
    with pytest.raises(HubError, match="reading failed 5 times"):
        questions("http://127.0.0.1:9/chats.jsonl")
