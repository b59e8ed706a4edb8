"""Byte streams: compression, encodings, truncation, damage and expansion limits."""

import bz2
import gzip
import json
import lzma
import tracemalloc

import pytest
from reader_helpers import LINES, ROWS, data_of, outcomes, write, zstd

from ftdata.errors import InputRefused, UsageError
from ftdata.readers import resolve_sources

PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json"])
def test_compressed_files_are_read(tmp_path, packing, name):
    path = write(tmp_path, f"{name}.{packing}", PACKERS[packing](LINES))
    assert data_of(path) == ROWS
    misnamed = write(tmp_path, f"plain-{packing}.jsonl", PACKERS[packing](LINES))
    assert data_of(misnamed) == ROWS


@pytest.mark.parametrize("packing", PACKERS)
def test_damaged_compressed_file_is_refused(tmp_path, packing):
    packed = PACKERS[packing](LINES * 500)
    for name, data in {"cut": packed[: len(packed) // 2], "bad": packed[:40] + b"\xff\x00" * 9 + packed[58:]}.items():
        with pytest.raises(InputRefused, match=f"{name}.jsonl.{packing}: the {packing} file is"):
            data_of(write(tmp_path, f"{name}.jsonl.{packing}", data))


def test_compressed_file_above_the_expansion_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("ftdata.readers.streams.FREE", 1 << 20)
    path = write(tmp_path, "bomb.jsonl.gz", gzip.compress(b" " * (8 << 20)))
    with pytest.raises(InputRefused, match="expansion"):
        data_of(path)


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]
)
def test_encodings_are_detected(tmp_path, encoding):
    text = LINES.decode()
    assert data_of(write(tmp_path, "d.jsonl", text.encode(encoding))) == ROWS
    assert data_of(write(tmp_path, "d.json", json.dumps(ROWS, indent=1).encode(encoding))) == ROWS


def test_encoding_option_is_followed(tmp_path):
    path = write(tmp_path, "d.jsonl", '{"text": "café ’"}\n{"text": "b"}\n'.encode("cp1252"))
    assert data_of({"path": path, "encoding": "cp1252"}) == [{"text": "café ’"}, {"text": "b"}]
    bad, _ = outcomes(path)
    assert (bad.code, bad.source.line) == ("encoding", 1)
    assert "encoding='cp1252'" in bad.fix
    with pytest.raises(UsageError, match="encoding is 'cp12525'"):
        data_of({"path": path, "encoding": "cp12525"})
    with pytest.raises(UsageError, match="did you mean 'encoding'"):
        data_of({"path": path, "encodign": "cp1252"})


def test_lone_surrogates_in_utf16_are_rejected_at_their_line(tmp_path):
    text = '{"text": "a"}\n{"text": "X"}\n'.encode("utf-16-le").replace("X".encode("utf-16-le"), b"\x00\xd8")
    good, bad = outcomes(write(tmp_path, "d.jsonl", b"\xff\xfe" + text))
    assert (good.data, bad.code, bad.source.line) == ({"text": "a"}, "encoding", 2)


def test_data_after_a_compressed_stream_is_damage(tmp_path):
    for packing in ("bz2", "xz"):
        twice = PACKERS[packing](LINES) * 2
        assert data_of(write(tmp_path, f"d.jsonl.{packing}", twice)) == ROWS * 2
        with pytest.raises(InputRefused, match="damaged_file|partial_file"):
            data_of(write(tmp_path, f"e.jsonl.{packing}", PACKERS[packing](LINES) + b"XX" + twice))


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["bz2", "xz"])
def test_decompression_stops_at_the_expansion_limit(tmp_path, packing, monkeypatch):
    from ftdata.readers import streams

    monkeypatch.setattr(streams, "FREE", 1 << 22)
    bomb = PACKERS[packing](LINES + b" " * (1 << 26))
    tracemalloc.start()
    with pytest.raises(InputRefused, match="expansion"):
        data_of(write(tmp_path, f"d.jsonl.{packing}", bomb))
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    tracemalloc.stop()


def test_padding_and_skippable_frames_are_accepted(tmp_path):
    assert data_of(write(tmp_path, "d.jsonl.xz", lzma.compress(LINES) + b"\0" * 8 + lzma.compress(LINES))) == ROWS * 2
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    assert data_of(write(tmp_path, "d.jsonl.zst", skipped + zstd(LINES))) == ROWS
    assert data_of(write(tmp_path, "d.jsonl", b"\xef\xbb\xbf" + LINES + b"\xef\xbb\xbf" + LINES)) == ROWS * 2
    with pytest.raises(InputRefused, match=r"packed_table.*decompress it first"):
        data_of(write(tmp_path, "d.parquet.gz", gzip.compress(b"PAR1")))


@pytest.mark.parametrize(("encoding", "byte"), [("cp1253", b"\xd2\xaa"), ("ascii", "é".encode()), ("cp1252", b"\x81")])
def test_undefined_bytes_of_an_encoding_are_rejected(tmp_path, encoding, byte):
    text = b'{"question": "' + byte + b'", "answer": "a"}\n'
    (bad,) = [
        row
        for source in resolve_sources({"path": write(tmp_path, "d.jsonl", text), "encoding": encoding})
        for row in source.rows()
    ]
    assert bad.code == "encoding"
    assert "not valid text in the encoding of the file: byte 0x" in bad.reason
    assert data_of({"path": write(tmp_path, "e.jsonl", LINES), "encoding": "utf-8-sig"}) == ROWS
