"""Read and write sources on localhost with random network faults, and check every result.

    python tests/schedules.py [COUNT] [SEED]

Each schedule chooses a source (hub files, downloaded or streamed; a file on a web server, as a whole or in ranges; an
object store, read in ranges or written to) and up to twelve faults. The result must be all rows, a network error that
names the source, or an error for a file that has changed. Prints the number of each result as JSON.
"""

import json
import logging
import os
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from hub import bucket, server

ROWS = [{"question": f"q{n}", "answer": "a" * 200} for n in range(9000)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FAULTS = (408, 429, 500, 502, 503, 504, "cut")
MOST_REQUESTS = 400


def main():
    count, seed = (int(text) for text in [*sys.argv[1:], "100", "0"][:2])
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as scratch, server.serving() as (hub, address), bucket.serving() as store:
        # The hub's client reads them when it is imported.
        os.environ.update(HF_ENDPOINT=address, HF_HUB_DISABLE_XET="1", FTDATA_CACHE=f"{scratch}/cache")
        os.environ.pop("HF_HUB_OFFLINE", None)
        from ftdata.readers import file_parts, remote_files

        remote_files.PAUSE, file_parts.PART = 0.001, 400_000
        tally, most = Counter(), 0
        for number in range(count):
            hub.asked.clear()
            store.asked.clear()
            os.environ["HF_HOME"] = f"{scratch}/home"
            tally[trial(random.Random(seed * 1_000_003 + number), hub, store, address, scratch)] += 1
            most = max(most, len(hub.asked) + len(store.asked))
    bad = {name: times for name, times in tally.items() if name.startswith("BAD")}
    # Were it always refused, nothing would ever be read half.
    if tally["whole"] + tally["sent"] < count / 3:
        bad["BAD: hardly anything arrives"] = count
    sys.stdout.write(
        json.dumps({"schedules": count, **dict(sorted(tally.items())), "most requests": most, **bad}) + "\n"
    )
    sys.exit(1 if bad or most > MOST_REQUESTS else 0)


def trial(chance, hub, store, address, scratch):
    import fsspec

    from ftdata.errors import FtdataError, HubError
    from ftdata.readers.file_parts import split_into_parts
    from ftdata.readers.sources import resolve_sources

    # Nothing of an earlier trial helps.
    name = f"n{chance.getrandbits(60):x}"
    hub.faults, store.faults = [], []
    hub.add(f"me/{name}", {"a.jsonl": LINES})
    hub.files[f"{name}.jsonl"] = LINES
    fsspec.filesystem("s3").pipe(f"data/{name}/a.jsonl", LINES)
    kind = chance.choice(["hub", "streaming", "files", "whole", "store", "write"])
    data = {
        "hub": f"me/{name}",
        "streaming": {"path": f"me/{name}", "streaming": True},
        "files": f"{address}/files/{name}.jsonl",
        "whole": f"{address}/whole/{name}.jsonl",
    }.get(kind, f"s3://data/{name}")
    faults = [(".", chance.choice(FAULTS)) for _ in range(chance.choice([1, 3, 6, 12]))]
    changes = kind == "files" and chance.random() < 0.3
    hub.faults = store.faults = [*faults, *([(f"/files/{name}", "other")] if changes else [])]
    try:
        if kind == "write":
            return written(name, scratch, store)
        rows = [next(iter(row.data.values())) for one in split_into_parts(resolve_sources(data)) for row in one.rows()]
    except HubError as error:
        return "exit 6" if named(error, name) else f"BAD words: {error}"
    except FtdataError as error:
        return f"exit {error.exit_code} {error.code}" if changes and error.code == "file_changed" else f"BAD {error}"
    whole = [row["question"] for row in ROWS]
    return "whole" if rows == whole or (changes and rows == [one.upper() for one in whole]) else "BAD rows"


def named(error, name):
    return name in str(error) and any(word in str(error) for word in ("answered", "attempts", "times", "sent"))


def written(name, scratch, store):
    """Upload a build: the store contains a manifest only if it contains every file of the manifest."""
    from ftdata.build import remote
    from ftdata.build import store as builds
    from ftdata.errors import HubError

    folder = Path(scratch) / name
    (folder / "train").mkdir(parents=True)
    for file in ("train/data-00000.arrow", "train/data-00001.arrow", "report.json"):
        (folder / file).write_bytes(LINES[: 100_000 + len(file)])
    builds.write_manifest(folder, {"fingerprint": name}, [])
    said = "sent"
    try:
        remote.upload_build(folder, f"s3://data/{name}/out")
    except HubError as error:
        if not named(error, name):
            return f"BAD words: {error}"
        said = "exit 6"
    store.faults.clear()
    there = remote.read_remote_manifest(f"s3://data/{name}/out")
    if there is None:
        return f"{said}, no build" if said == "exit 6" else "BAD lost"
    return said if remote.verify(f"s3://data/{name}/out") == [] else "BAD half"


if __name__ == "__main__":
    main()
