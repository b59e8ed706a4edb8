"""The cache: unchanged work is not repeated, and a cached build equals an uncached build."""

import json
import os
import shutil

import numpy as np
import pytest
import xxhash

from ftdata.build import cache, shards
from ftdata.build.dataset import write_build
from ftdata.errors import StorageError, UsageError
from ftdata.tokenizing.encoders import Encoders, ReferenceEncoder


def rows(name, count=40):
    return [
        {
            "messages": [{"role": "user", "content": f"{name} asks {n}"}, {"role": "assistant", "content": f"says {n}"}]
            * 2
        }
        for n in range(count)
    ]


def write(path, conversations):
    path.write_text("".join(json.dumps(one) + "\n" for one in conversations))
    return path


@pytest.fixture
def files(tmp_path):
    return [write(tmp_path / f"{name}.jsonl", rows(name)) for name in ("a", "b")]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def work(monkeypatch):
    """Count the shards that are built, and the texts that are encoded."""
    done = {"shards": 0, "texts": 0}
    built, encode = shards._build, Encoders._encode

    def counted(*arguments):
        done["shards"] += 1
        return built(*arguments)

    def encoded(self, texts):
        done["texts"] += len(texts)
        return encode(self, texts)

    monkeypatch.setattr(shards, "_build", counted)
    monkeypatch.setattr(Encoders, "_encode", encoded)

    def since():
        found = tuple(done.values())
        done.update(shards=0, texts=0)
        return found

    return since


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def build(tmp_path, tokenizer_dir, monkeypatch):
    """Return a function that builds; its `compare` also builds without the cache and compares the files."""

    def make(data, **options):
        folders = tmp_path / "built", tmp_path / "afresh"
        for folder in folders:  # else what is there already is looked at, and found to be the same
            shutil.rmtree(folder, ignore_errors=True)
        write_build([str(one) for one in data], tokenizer_dir("tiny_bpe"), folders[0], **options)
        return folders[0]

    def compare(data, **options):
        folder = make(data, **options)
        with monkeypatch.context() as patch:
            patch.setenv("FTDATA_CACHE", "off")
            write_build([str(one) for one in data], tokenizer_dir("tiny_bpe"), tmp_path / "afresh", **options)
        assert files_of(folder) == files_of(tmp_path / "afresh")

    make.compare = compare
    return make


def test_unchanged_sources_are_not_rebuilt(kept, files, build, work):
    build(files, packing="bfd", max_length=80)
    assert work() == (2, 80)
    for options in ({"packing": "bfd"}, {}, {"packing": "bfd", "shuffle": True, "seed": 3}, {"test_size": 8}):
        build(files, max_length=80, **options)
        assert work() == (0, 0)
    build([{"path": str(files[0]), "weight": 0.5}, files[1]][1:], max_length=80)
    assert work() == (0, 0)


def test_cached_build_equals_an_uncached_build(kept, files, build):
    for options in (
        {},
        {"train_on": "last_assistant"},
        {"packing": "bfd", "max_length": 80},
        {"near_duplicate_threshold": 0.9, "dedup": True},
    ):
        for _ in range(2):
            build.compare(files, **options)


def test_only_the_changed_source_is_rebuilt(kept, files, build, work):
    build(files)
    work()
    write(files[1], [*rows("b"), *rows("new", 1)])
    build(files)
    assert work() == (1, 1)
    build.compare(files)


def test_new_mask_policy_reuses_the_cached_tokens(kept, files, build, work):
    build(files)
    work()
    for options in (
        {"train_on": "last_assistant"},
        {"train_parts": ["answer"]},
        {"max_length": 60, "overlong": "truncate"},
    ):
        build(files, **options)
        assert work() == (2, 0)
        build.compare(files, **options)
        work()


def test_rejected_rows_are_cached(kept, tmp_path, build):
    path = write(tmp_path / "some.jsonl", [*rows("a", 3), {"messages": []}, {"x": 1}])
    for _ in range(2):
        build.compare([path], on_bad_rows="quarantine", max_rejects=5)
        assert len((tmp_path / "built" / "rejects.jsonl").read_text().splitlines()) == 2


def other(rendered, conversation):
    return [span.generated for span in rendered.spans]


def test_user_functions_are_not_cached(kept, files, build, work):
    for _ in range(2):
        build(files, train_on=other)
        assert work()[0] == 2


def test_changed_package_code_invalidates_the_shards(kept, files, build, work, monkeypatch):
    build(files)
    work()
    monkeypatch.setattr(cache, "package_hash", lambda: "changed")
    build(files)
    assert work() == (2, 0)


CACHED = ["ids.i32", "trained.b8", "examples.arrow", "result.json", "hashes", "places.i64", "offsets.i32"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=() if number % 3 == at % 3 else pytest.mark.long)
        for number, name in enumerate(CACHED)
        for at, damage in enumerate([b"", b"x", None])
    ],
)
def test_damaged_cache_does_not_change_the_build(kept, files, build, name, damage):
    build(files)
    damaged = list(kept.rglob(name))
    assert damaged
    for path in damaged:
        found = path.read_bytes()
        path.unlink()
        if damage is not None:
            path.write_bytes(found[:-7] if damage else b"")
    build.compare(files, train_on="last_assistant")
    build.compare(files)


def test_flipped_bit_in_the_cache_is_detected(kept, files, build, work):
    build(files)
    work()
    path = next(kept.glob("shards/*/trained.b8"))
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.unlink()
    path.write_bytes(content)
    build.compare(files)


def test_files_with_colliding_hashes_are_different_sources(kept, tmp_path, build, work):
    """Two files with the same 128-bit XXH3 hash; such collisions are easy to construct."""
    path, hashes = tmp_path / "a.jsonl", set()
    for first, middle in (("aaaa", "ecc"), ("cecc", "aaa")):
        asked = "a" * 153 + first + "04AD" + "b" * 120 + ("c" + middle if first == "aaaa" else "a" + middle)
        turns = [{"role": "user", "content": asked + "KxTz" + "c" * 300}, {"role": "assistant", "content": "fine"}]
        path.write_text(json.dumps({"messages": turns}, separators=(",", ":")) + "\n")
        hashes.add(xxhash.xxh3_128_hexdigest(path.read_bytes()))
        build.compare([path])
    assert len(hashes) == 1


def test_cache_can_be_disabled_or_moved(monkeypatch, tmp_path, files, build, work):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("off", "0", ""):
        monkeypatch.setenv("FTDATA_CACHE", value)
        build(files)
        assert work()[0] == 2
    assert not (tmp_path / "home").exists()
    monkeypatch.delenv("FTDATA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    build(files)
    assert (tmp_path / "xdg" / "ftdata" / "shards").is_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_cache_is_ignored(kept, files, build):
    kept.mkdir()
    kept.chmod(0o500)
    build(files)


def test_cache_path_that_is_a_file_is_ignored(kept, files, build):
    kept.write_text("")
    build(files)


def test_old_shards_are_evicted_from_the_cache(kept, files, build, work, monkeypatch):
    build([files[0]])
    build([files[1]])
    size = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    for entry in kept.glob("*/*"):
        os.utime(entry, (1, 1))
    build([files[1]])
    work()
    usage = shutil.disk_usage(kept)._replace(total=10 * (size // 2 + 2000))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    cache.evict_entries()
    assert len(list(kept.glob("shards/*"))) == 1
    build([files[1]])
    assert work() == (0, 0)


def test_tokens_of_deleted_texts_are_evicted(kept, tmp_path, build):
    path = tmp_path / "moving.jsonl"
    for number in range(12):
        write(path, rows(f"version {number}", 10))
        build([path])
    known = sum(file.stat().st_size for file in kept.glob("texts/*/*/ids.i32"))
    one = sum(file.stat().st_size for file in kept.glob("shards/*/ids.i32")) / 12
    assert known < 6 * one


def test_text_cache_returns_the_stored_tokens(kept, tokenizer_dir):
    import tokenizers

    engine = ReferenceEncoder(tokenizers.Tokenizer.from_file(f"{tokenizer_dir('tiny_bpe')}/tokenizer.json"))
    said = ["", "a", "a", "naïve 数据", "b" * 300, "\x00"]
    expected = engine.encode(said)
    for _ in range(2):
        with cache.open_text_cache("key") as texts:
            found = texts.encode(said, engine.encode)
        assert all(
            np.array_equal(a, b)
            for one, two in zip(found, expected, strict=True)
            for a, b in zip(one[:2], two[:2], strict=True)
        )
    with cache.open_text_cache("key") as texts:
        assert texts.has_entries
        assert len(texts.encode(said, lambda missing: pytest.fail(str(missing)))) == 6


@pytest.mark.parametrize("name", ["ids.i32", "offsets.i32", "places.i64", "hashes", "result.json"])
def test_damaged_text_cache_is_rebuilt(name, kept, files, build, work):
    """A new mask policy reads tokens from the text cache: a flipped bit there must not reach the build."""
    build(files)
    work()
    (part,) = [path for path in (kept / "texts").glob("*/*") if path.is_dir()][:1]
    file = part / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    build.compare(files, train_on="last_assistant")
    assert work()[1] > 0
    build.compare(files, train_on="all")


@pytest.mark.timeout(60)
def test_cache_entries_that_are_not_regular_files_are_ignored(kept, files, build, work):
    """Reading a pipe would block, and reading `/dev/zero` would never end."""
    build(files)
    entries = [path for path in kept.rglob("*") if path.is_file()]
    assert {path.name for path in entries} >= {"ids.i32", "result.json"}
    for number, path in enumerate(entries):
        path.unlink()
        if number % 2:
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
    build.compare(files)


def test_build_continues_if_the_cache_is_cleared(kept, tokenizer_dir):
    """New texts are not stored, and the tokens are the same."""
    import tokenizers

    engine = ReferenceEncoder(tokenizers.Tokenizer.from_file(f"{tokenizer_dir('tiny_bpe')}/tokenizer.json"))
    with cache.open_text_cache("key") as texts:
        texts.encode(["a"], engine.encode)
        cache.clear_cache()
        assert texts.encode(["b c"], engine.encode).ids.tolist() == engine.encode(["b c"]).ids.tolist()
    assert not list(kept.glob("texts/*/*/ids.i32"))


def test_cache_that_cannot_be_cleared_is_an_error(kept, files, build, monkeypatch):
    build(files)
    monkeypatch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(StorageError, match="cannot remove all files in .*shards"):
        cache.clear_cache()


def test_cache_folder_that_cannot_be_written_is_reported(tokenizer_dir, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTDATA_CACHE", str(tmp_path / "file" / "cache"))
    write_build([{"question": "q", "answer": "a"}], tokenizer_dir("tiny_bpe"), tmp_path / "out")
    assert "cannot be written, so the build does not use a cache" in caplog.text


def test_existing_build_with_other_template_variables_is_named(tokenizer_dir, tmp_path):
    rows = [{"question": "q", "answer": "a"}]
    write_build(rows, tokenizer_dir("qwen"), tmp_path / "out")
    with pytest.raises(UsageError, match=r'template_kwargs \(build: {}, requested: {"enable_thinking": false}\)'):
        write_build(rows, tokenizer_dir("qwen"), tmp_path / "out", template_kwargs={"enable_thinking": False})
