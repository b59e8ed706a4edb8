"""Crash safety: an interrupted build leaves the old or the new version, and the same command resumes it."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import pytest
from cases import long
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from ftdata import verify
from ftdata.build.dataset import write_build
from ftdata.storage.disk import OPERATIONS

OPTIONS = {
    "packing": "bfd",
    "max_length": 128,
    "test_size": 2,
    "on_bad_rows": "quarantine",
    "max_rejects": "50%",
}
FAULTS = ("kill", "enospc", "eio", "readonly")


def rows(word, count):
    for number in range(count):
        talk = [{"role": "user", "content": f"{word} {number}?"}, {"role": "assistant", "content": "yes " * number}]
        yield json.dumps({"messages": talk}) if number % 5 else '{"half'


class Builder:
    """Run builds in subprocesses and check the output folder after each of them."""

    def __init__(self, folder, tokenizer):
        self.folder, self.tokenizer, self.target = folder, tokenizer, folder / "to" / "out"
        self.data = [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
        self.whole = {}
        for version in ("old", "new"):
            self.write(version)
            write_build(self.data, tokenizer, folder / version, **OPTIONS)
            self.whole[version] = contents(folder / version)
        assert self.whole["old"] != self.whole["new"]
        command = [sys.executable, str(Path(__file__).parents[1] / "crashes.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def write(self, version):
        for path in self.data:
            Path(path).write_text("".join(f"{row}\n" for row in rows(version, 6)))

    def begin(self, old):
        """Put the old build at the target, or remove it; write the data of the new build."""
        shutil.rmtree(self.target.parent, ignore_errors=True)
        self.target.parent.mkdir()
        if old:
            shutil.copytree(self.folder / "old", self.target)

    def build(self, **how):
        given = {"data": self.data, "tokenizer": self.tokenizer, "output_dir": str(self.target), "options": OPTIONS}
        asked = {**given, **how}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def state(self):
        """Return the version at the target, or `None`; fail for any other state."""
        assert [path.name for path in self.target.parent.iterdir() if not path.name.startswith(".")] in ([], ["out"])
        if not self.target.exists():
            return None
        (found,) = [version for version, files in self.whole.items() if files == contents(self.target)]
        assert verify(self.target) == []
        return found

    def goes_on(self):
        """Run the same command again; assert that it leaves only the new build."""
        done = self.build()
        assert done["code"] == 0, done
        assert self.state() == "new"
        assert [path.name for path in self.target.parent.iterdir()] == ["out"]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def builder(tmp_path_factory, tokenizer_dir):
    # In memory, where that can be: what a disk takes to sync is not what is tried here.
    memory = Path("/dev/shm")
    home = (
        tempfile.TemporaryDirectory(dir=memory)
        if os.access(memory, os.W_OK)
        else nullcontext(tmp_path_factory.mktemp("c"))
    )
    with home as folder:
        found = Builder(Path(folder), tokenizer_dir("tiny_bpe"))
        yield found
        found.end()


def operations(builder, old):
    """Return the disk operations of a build with their paths, in order."""
    builder.begin(old)
    done = builder.build(failpoint="*:0:trace")
    assert done["code"] == 0, done
    return [tuple(line.split(" ", 2)[1:]) for line in done["error"].splitlines()]


def is_publication(step, builder):
    """Return whether this operation puts the new build at the target."""
    operation, path = step
    return operation in ("rename", "swap") and path == str(builder.target)


def test_disk_operations_all_have_failpoints(builder):
    """The tests below cover every disk operation: no module writes files in another way."""
    assert {name for name, _ in operations(builder, old=True)} == {*OPERATIONS} - {"link"}  # which is for the cache
    source = (Path(__file__).parents[2] / "ftdata").rglob("*.py")
    for path in source:
        # `datatrove.py` calls a method of datatrove, whose name is that of a method of `Path`.
        if {"train", "templates", "cli"} & {*path.parts} or path.name in ("disk.py", "cache.py", "datatrove.py"):
            continue
        text = path.read_text()
        for way in (".write_text(", ".write_bytes(", 'open("w', "os.rename", "os.replace", "mkstemp", "shutil.move"):
            assert way not in text, (path, way)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "old"),
    [("kill", True), ("kill", False), *((fault, True) for fault in FAULTS[1:]), *map(long, FAULTS[1:], [False] * 3)],
)
@pytest.mark.parametrize("every", [36, pytest.param(1, marks=pytest.mark.long)])
def test_every_disk_operation_may_fail(builder, fault, old, every):
    """G8, G9: at each write, sync and rename; without `-m long` at every thirty-sixth."""
    before = "old" if old else None
    asked = operations(builder, old)
    (published,) = [number for number, step in enumerate(asked, 1) if is_publication(step, builder)]
    for number, (operation, _) in islice(enumerate(asked, 1), FAULTS.index(fault) % every, None, every):
        builder.begin(old)
        done = builder.build(failpoint=f"*:{number}:{fault}")
        where = (number, operation, done)
        if fault == "kill":
            assert done["code"] == -9, where
        elif done["code"] != 0:
            # What cannot be tidied away does no harm.
            assert done["code"] == 5, where
            assert str(builder.target) in done["error"], where
            assert "Fix: " in done["error"], where
        else:
            assert operation == "remove", where
        assert builder.state() == ("new" if number > published or (done["code"] == 0) else before), where
        builder.goes_on()


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("builds", [4, pytest.param(100, marks=pytest.mark.long)])
def test_build_may_be_killed_at_any_time(builder, old, builds):
    """G8: SIGKILL at random times, often several times before a build is complete."""
    dice, before = random.Random(old), "old" if old else None
    seen = set()
    for _ in range(builds):
        builder.begin(old)
        for _ in range(dice.randint(1, 3)):
            done = builder.build(seconds=dice.uniform(0, 0.15))
            assert done["code"] in (0, -9), done
            found = builder.state()
            assert found in (before, "new")
            seen.add((done["code"], found))
        builder.goes_on()
    assert (-9, before) in seen


@pytest.mark.slow
@pytest.mark.parametrize("many", [2, 4, 8])
@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.long)])
def test_builds_at_once_make_one_build(builder, many, rounds):
    """G12: one process builds; the other processes wait and reuse its result."""
    for number in range(rounds):
        builder.begin(old=number % 2)
        done = builder.build(together=many)
        assert done["codes"] == [0] * many, done
        assert done["error"].count("built;") == 1, done
        assert done["error"].count("there;") == many - 1, done
        assert builder.state() == "new"
        assert [path.name for path in builder.target.parent.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("every", [24, long(12), long(6)])
def test_waiting_builds_resume_after_the_first_is_killed(builder, every):
    for number in range(1, len(operations(builder, old=True)) + 1, every):
        builder.begin(old=True)
        done = builder.build(together=3, failpoint=f"*:{number}:kill", first_only=True)
        assert sorted(done["codes"]) == [-9, 0, 0], done
        assert builder.state() == "new"
        assert [path.name for path in builder.target.parent.iterdir()] == ["out"]


def test_damage_is_detected_before_use(builder, tokenizer_dir):
    """G10: 500 flipped bits and cuts, in every file including the manifest."""
    builder.begin(old=True)
    dice, whole = random.Random(0), builder.whole["old"]
    for number in range(500):
        name = dice.choice(sorted(name for name in whole if whole[name]))
        path, data = builder.target / name, bytearray(whole[name])
        if number % 3:
            at = dice.randrange(len(data))
            data[at] ^= 1 << dice.randrange(8)
        else:
            del data[dice.randrange(len(data)) :]
        path.write_bytes(data)
        assert verify(builder.target) == [name]
        path.write_bytes(whole[name])
    assert verify(builder.target) == []


class Changes(RuleBasedStateMachine):
    """Data, options and cached files change, and builds are killed; a build is always complete and up to date."""

    builder = cache = None

    def __init__(self):
        super().__init__()
        self.builder.begin(old=False)
        self.builder.write("old")
        shutil.rmtree(self.cache, ignore_errors=True)
        self.options, self.seen = dict(OPTIONS), []

    def expected(self):
        with tempfile.TemporaryDirectory(dir=self.builder.folder) as folder:
            write_build(self.builder.data, self.builder.tokenizer, Path(folder) / "out", **self.options)
            return contents(Path(folder) / "out")

    @rule(file=st.integers(0, 1), letter=st.sampled_from("abc"), at=st.integers(0, 5))
    def edit(self, file, letter, at):
        """Edit a row, but keep the size and the modification time of the file."""
        path = Path(self.builder.data[file])
        before, text = path.stat(), path.read_text().split("\n")
        text[at] = re.sub(r"\w\w? (?=\d)", f"{letter}{letter} ", text[at], count=1)
        path.write_text("\n".join(text))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    @rule(file=st.integers(0, 1), count=st.integers(1, 9))
    def grow(self, file, count):
        with Path(self.builder.data[file]).open("a") as out:
            out.writelines(f"{row}\n" for row in rows("more", count))

    @rule(file=st.integers(0, 1))
    def exchange(self, file):
        """Replace a file by another one with the same name."""
        path = Path(self.builder.data[file])
        path.with_suffix(".new").write_text("".join(f"{row}\n" for row in rows("other", 5)))
        path.with_suffix(".new").replace(path)

    @rule(file=st.integers(0, 1))
    def touch(self, file):
        os.utime(self.builder.data[file])

    @rule(
        turned=st.sampled_from(
            [{"packing": None}, {"packing": "bfd"}, {"train_on": "all"}, {"test_size": 3}, {"seed": 7}]
        )
    )
    def choose(self, turned):
        self.options |= turned

    @rule(part=st.floats(0, 1), bit=st.integers(0, 7), where=st.sampled_from(["cache", "place"]))
    def damage(self, part, bit, where):
        """Flip a bit in the cache or in the workspace of a killed build."""
        folder = self.cache if where == "cache" else self.builder.target.parent / ".out.ftdata"
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        if files:
            path = files[int(part * (len(files) - 1))]
            data = bytearray(path.read_bytes())
            data[int(part * (len(data) - 1))] ^= 1 << bit
            path.write_bytes(data)

    @rule(number=st.integers(1, 90), fault=st.sampled_from(FAULTS), cached=st.booleans())
    def fail(self, number, fault, cached):
        self.seen.append(self.expected())
        done = self.build(cached, failpoint=f"*:{number}:{fault}")
        assert done["code"] in (-9, 5, 0), done
        self.whole(late=done["code"] != 0)

    @rule(cached=st.booleans(), together=st.sampled_from([0, 2]))
    def succeed(self, cached, together):
        expected = self.expected()
        self.seen.append(expected)
        done = self.build(cached, together=together)
        assert done.get("codes", [done["code"]]) == [0] * (together or 1), done
        assert contents(self.builder.target) == expected
        assert [path.name for path in self.builder.target.parent.iterdir()] == ["out"]

    def build(self, cached, **how):
        return self.builder.build(cache=str(self.cache) if cached else "off", options=self.options, **how)

    def whole(self, late):
        if self.builder.target.exists():
            assert contents(self.builder.target) in (self.seen if late else self.seen[-1:])
            assert verify(self.builder.target) == []


@pytest.mark.slow
@pytest.mark.parametrize("examples", [3, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])])
def test_changes_never_give_an_outdated_build(builder, examples):
    """G11."""
    Changes.builder, Changes.cache = builder, builder.folder / "cache"
    run_state_machine_as_test(Changes, settings=settings(max_examples=examples, stateful_step_count=12, deadline=None))
