"""Fuzz targets for the parsers of untrusted data: random bytes may only cause an FtdataError.

    python tests/fuzz.py --list
    python tests/fuzz.py TARGET [-max_total_time=600] [FOLDER]     needs atheris (pip install atheris==3.0.0)

FOLDER stores the inputs that reach new code. It starts with the seeds and the cases of `FTDATA_SHARED/badinput`.
"""

import importlib
import json
import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path

SHARED = Path(os.environ.get("FTDATA_SHARED", Path(__file__).parents[2] / "shared"))
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def formats():
    from ftdata.readers.formats import readers

    return sorted({reader: name for name, reader in reversed(readers.registered().items())}.values())


def read(data):
    """Read a file of any format, which the first byte selects."""
    from ftdata.readers.sources import FileSource

    known = formats()
    with tempfile.NamedTemporaryFile(dir=scratch(), suffix=".data") as file:
        file.write(data[1:])
        file.flush()
        source = FileSource(file.name, known[data[0] % len(known)] if data else "json")
        with closing(source.rows()) as rows:
            for _, _row in zip(range(1000), rows, strict=False):
                pass


def normalise(data):
    """Normalize a JSON row with every schema."""
    from ftdata.schemas import normalize, schemas
    from ftdata.types import Row, Source

    row = parsed(data)
    if isinstance(row, dict):
        for schema in ("auto", *schemas.names()):
            refused(lambda schema=schema: normalize(Row(row, Source("fuzz", 0)), schema))


def render(data):
    """Render a template; the first line is the conversation as JSON."""
    from ftdata.templates.template import Template
    from ftdata.templates.worker.client import render_in_worker
    from ftdata.types import Conversation

    first, _, source = data.partition(b"\n")
    template = Template("fuzz", source.decode("utf-8", "replace"))
    found = parsed(first)
    talk = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    messages = tuple({"role": str(one.get("role")), "content": str(one.get("content"))} for one in talk)
    render_in_worker(Conversation(messages), template)


def encode(data):
    """Encode a conversation of two texts with a fixed template."""
    from ftdata import encode
    from ftdata.testing import check_masking_rules

    question, _, answer = data.decode("utf-8", "replace").partition("\n")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    for example in encode(messages, tokenizer(), CHAT):
        check_masking_rules(example, messages)


def manifest(data):
    """Read the manifest of a build."""
    from ftdata.build.store import parse_manifest

    parse_manifest(data, "manifest.json")


def config(data):
    """Load a configuration: TOML if the first byte is even, otherwise YAML."""
    from ftdata.config import load_config

    path = Path(scratch()) / ("c.toml" if data[:1] and data[0] % 2 == 0 else "c.yaml")
    path.write_bytes(data[1:])
    load_config(path)


TARGETS = {one.__name__: one for one in (read, normalise, render, encode, manifest, config)}
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SEEDS = {
    "read": [(kind, data) for kind, data in {"json": b'[{"a": 1}, {"b": [null, 1e5]}]', "jsonl": b'{"a": "\\u0022"}\n{}\n', "csv": b'a,b\n1,"2\n"\n', "tsv": b"a\tb\n1\t2\n"}.items()],
    "normalise": [json.dumps(one).encode() for one in ({"messages": TALK}, {"question": "q", "answer": "a"}, {"prompt": "p", "completion": [1]})],
    "render": [json.dumps(TALK).encode() + b"\n" + one.encode() for one in (CHAT, "{{ messages[0].content | replace('a', 'b') }}", "{% generation %}{% endgeneration %}")],
    "encode": [b"question\nanswer", b"<|im_start|>\n<|im_end|>", "\u200b\n\ufeff".encode()],
    "manifest": [b'{"format": 4, "files": {}, "sha256": "0"}', b"[]"],
    "config": [b"\x01data: d\nmodel: m\noutput_dir: o\n", b'\x00data = "d"\nmodel = "m"\n', b"\x01a: &a [*a]\n"],
}  # fmt: skip
_made = []


def parsed(data):
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def scratch():
    if not _made:
        _made.append(tempfile.TemporaryDirectory())
    return _made[0].name


def tokenizer():
    from tokenizer_makers import tiny_bpe

    folder = Path(scratch()) / "tokenizer"
    return str(folder) if folder.is_dir() else tiny_bpe(folder)


def refused(work):
    """Run the target; only an FtdataError is allowed."""
    from ftdata.errors import FtdataError, InternalError

    try:
        work()
    except InternalError:
        raise
    except FtdataError:
        return


def run_target(target, data):
    """Run a target with these bytes."""
    refused(lambda: TARGETS[target](data))


def tables():
    """Return a small Parquet file and a small Arrow file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"messages": [TALK, None], "n": [1, 2]})
    for kind in ("parquet", "arrow"):
        sink = pa.BufferOutputStream()
        if kind == "parquet":
            pq.write_table(table, sink)
        else:
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        yield kind, sink.getvalue().to_pybytes()


def seeds(target):
    if target != "read":
        yield from SEEDS[target]
        if target == "render":
            yield from templates()
        return
    known = formats()
    for kind, data in [*SEEDS["read"], *tables()]:
        yield bytes([known.index(kind)]) + data
    if SHARED.is_dir():
        for file in sorted((SHARED / "badinput" / "dev" / "cases").glob("*/data*")):
            if file.stat().st_size < 1 << 16:
                kind = file.suffix.removeprefix(".")
                yield bytes([known.index(kind) if kind in known else 0]) + file.read_bytes()


def templates():
    if SHARED.is_dir():
        for template in json.loads((SHARED / "badinput" / "dev" / "templates" / "templates.json").read_text()).values():
            yield json.dumps(TALK).encode() + b"\n" + template["template"].encode()


def main():
    if sys.argv[1:] == ["--list"]:
        sys.stdout.write("\n".join(TARGETS) + "\n")
        return
    import atheris

    target, rest = sys.argv[1], sys.argv[2:]
    folder = Path(next((one for one in rest if not one.startswith("-")), tempfile.mkdtemp()))
    folder.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["ftdata"], enable_loader_override=False):
        for name in ("config", "examples", "readers", "store"):
            importlib.import_module(f"ftdata.{name}")
    # What makes them is imported by now, so that it is instrumented.
    for number, data in enumerate(seeds(target)):
        (folder / f"seed-{number}").write_bytes(data)
    options = [one for one in rest if one.startswith("-")]
    atheris.Setup(
        [sys.argv[0], "-rss_limit_mb=4096", "-timeout=30", *options, str(folder)], lambda data: run_target(target, data)
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
