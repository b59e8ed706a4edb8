"""A cluster writes the same bytes as one machine, even if workers, nodes or the coordinator are lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftdata import verify
from ftdata.build.dataset import write_build
from ftdata.build.executors import check_engine, run_tasks
from ftdata.errors import MissingDependency, StorageError, UsageError
from ftdata.readers import file_parts

pytestmark = pytest.mark.slow

OPTIONS = {"packing": "bfd", "max_length": 256, "test_size": 20, "on_bad_rows": "quarantine", "max_rejects": "5%"}
BUILD = """
import json, sys
from ftdata.build.dataset import write_build
from ftdata.readers import file_parts
file_parts.PART = 20_000
given = json.loads(sys.argv[1])
write_build(given["data"], given["tokenizer"], given["output_dir"], engine=given["engine"], **given["options"])
"""


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def slowly(common, task):
    """Sleep, then return twice the task; the tasks in `deadly` kill their worker."""
    time.sleep(common["seconds"])
    if task in common["deadly"] and not Path(common["mark"] + str(task)).exists():
        if common["once"]:
            Path(common["mark"] + str(task)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task * 2


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.long)])
def test_lost_worker_is_replaced(cluster, tmp_path, engine):
    common = {"seconds": 0.01, "deadly": [3, 11], "mark": str(tmp_path / "mark"), "once": True}
    engine = f"ray:{cluster.address}" if engine == "ray" else engine
    assert sorted(run_tasks(slowly, common, range(20), 2, engine)) == [(number, 2 * number) for number in range(20)]


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.long)])
def test_task_that_kills_its_workers_is_named(cluster, tmp_path, engine):
    common = {"seconds": 0.01, "deadly": [3], "mark": str(tmp_path / "mark"), "once": False}
    engine = f"ray:{cluster.address}" if engine == "ray" else engine
    with pytest.raises(StorageError, match=r"worker_lost.*running 3: "):
        list(run_tasks(slowly, common, range(6), 1 if engine != "local" else 2, engine))


def failing(_, task):
    raise UsageError("code", f"task {task}", hint="none")


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_errors_of_workers_are_unchanged(cluster, engine):
    engine = f"ray:{cluster.address}" if engine == "ray" else engine
    with pytest.raises(UsageError, match=r"\[code\] task \d. Fix: none"):
        list(run_tasks(failing, None, range(3), 2, engine))


@pytest.mark.long
def test_slow_task_is_restarted_on_another_worker(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("ftdata.build.executors.SLOW_SECONDS", 1.0)
    common = {"mark": str(tmp_path / "mark")}
    began = time.monotonic()
    assert sorted(run_tasks(stuck_once, common, range(8), 4, f"ray:{cluster.address}")) == [(n, n) for n in range(8)]
    assert time.monotonic() - began < 60


def stuck_once(common, task):
    if task == 5:
        try:
            os.close(os.open(common["mark"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return task
        time.sleep(300)
    return task


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster on this machine: two nodes with two CPUs each."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False},
    )
    made.add_node(num_cpus=2, object_store_memory=80 << 20)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def data(tmp_path):
    for name in "ab":
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for n in range(3000):
                talk = [{"role": "user", "content": f"{name}{n}?"}, {"role": "assistant", "content": "yes " * (n % 40)}]
                file.write((json.dumps({"messages": talk}) if n % 999 else "{half") + "\n")
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


@pytest.fixture
def here(data, tmp_path, tokenizer_dir, monkeypatch):
    """The files of a build on one machine."""
    monkeypatch.setattr(file_parts, "PART", 20_000)
    write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / "here", **OPTIONS)
    return files(tmp_path / "here")


def begin(cluster, data, tokenizer, target):
    given = {"data": data, "tokenizer": tokenizer, "output_dir": str(target), "options": OPTIONS}
    given["engine"] = f"ray:{cluster.address}"
    return subprocess.Popen([sys.executable, "-c", BUILD, json.dumps(given)], stderr=subprocess.PIPE, text=True)


def wait_for_shards(target, count):
    """Wait until a build has at least `count` shards."""
    until = time.monotonic() + 120
    while sum(1 for _ in target.parent.glob(f".{target.name}.ftdata/shards/[!.]*")) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.long
def test_build_completes_after_a_node_is_killed(cluster, data, here, tmp_path, tokenizer_dir):
    target = tmp_path / "out"
    node = cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
    build = begin(cluster, data, str(tokenizer_dir("tiny_bpe")), target)
    wait_for_shards(target, 5)
    cluster.remove_node(node, allow_graceful=False)
    assert build.wait(200) == 0, build.stderr.read()
    build.stderr.close()
    assert files(target) == here
    assert verify(target) == []
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.long
def test_build_resumes_after_the_coordinator_is_killed(cluster, data, here, tmp_path, tokenizer_dir):
    target = tmp_path / "out"
    build = begin(cluster, data, str(tokenizer_dir("tiny_bpe")), target)
    wait_for_shards(target, 5)
    build.kill()
    build.communicate()
    done = {path.name: path.stat().st_ino for path in (tmp_path / ".out.ftdata" / "shards").glob("[!.]*")}
    assert not target.exists()
    assert len(done) >= 5
    again = begin(cluster, data, str(tokenizer_dir("tiny_bpe")), target)
    wait_for_shards(target, len(done) + 1)
    kept = {path.name: path.stat().st_ino for path in (tmp_path / ".out.ftdata" / "shards").glob("[!.]*")}
    assert done.items() <= kept.items()
    assert again.wait(200) == 0, again.stderr.read()
    again.stderr.close()
    assert files(target) == here


def test_unknown_engines_are_refused(monkeypatch):
    for engine in ("loca", "local:1", "", None, "spark"):
        with pytest.raises(UsageError, match="unknown_engine"):
            check_engine(engine)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ftdata\[ray\]'"):
        check_engine("ray")


def test_unreachable_cluster_is_refused(data, tmp_path, tokenizer_dir):
    with pytest.raises(UsageError, match="ray_address"):
        write_build(data, tokenizer_dir("tiny_bpe"), tmp_path / "out", engine="ray:127.0.0.1:1")
