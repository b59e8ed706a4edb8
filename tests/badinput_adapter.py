"""The adapter that runs ftdata in the harness of the shared bad-input corpus."""

import json
from collections import Counter


def ftdata(case, datafile, work, root):
    from tokenizers import Tokenizer

    from ftdata import build_sft_dataset

    options, folder = case["options"], root / "tokenizers" / case["tokenizer"]
    built = build_sft_dataset(
        str(datafile),
        tokenizer=str(folder),
        max_length=options["max_length"],
        packing="bfd" if options["packing"] else None,
        # The cases want a template refused whose own tags leave out the stop; without this it is trained, and flagged.
        reject_flags=["stop_outside_generation_tags"],
        on_bad_rows="quarantine",
        max_rejects="100%",
        output_dir=work / "build",
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    controls = {name: tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")}
    rows = []
    for pack in built["train"]:
        start = 0
        for length in pack["seq_lengths"]:
            ids, labels = (pack[name][start : start + length] for name in ("input_ids", "labels"))
            rows.append(_described(tokenizer, controls, ids, labels))
            start += length
    listed = (work / "build" / "rejects.jsonl").read_text().splitlines()
    # In an array, the cases count elements.
    place = (lambda one: one["row"] + 1) if str(datafile).endswith(".json") else lambda one: one["line"]
    rejects = [{"line": place(one), "reason": f"{one['reason']} {one['fix']}"} for one in map(json.loads, listed)]
    return {"rows": rows, "rejects": rejects}


def _described(tokenizer, controls, ids, labels):
    spans, current = [], []
    for token, label in [*zip(ids, labels, strict=True), (0, -100)]:
        if label != -100:
            current.append(token)
        elif current:
            spans.append(tokenizer.decode(current, skip_special_tokens=False))
            current = []
    counts = Counter(ids)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return {
        "n": len(ids),
        "text": text,
        "spans": spans,
        "control": {name: counts[one] for name, one in controls.items()},
    }
