"""The page of common problems: the codes of errors and flags by topic, with the fixes in the source code."""

import errors

from ftdata.inspection.checks import checks
from ftdata.pipeline.flags import FLAGS

HEAD = """# Troubleshooting

This page lists common problems with their fixes. An error message contains its code in brackets, its location and
its fix:

    ftdata: [no_template] MODEL: the tokenizer has no chat template. Fix: pass template= with one of ...

Find the code on this page, or in the list of all [errors](reference/errors.md) and [flags](reference/flags.md). `…`
stands for a value. To see the traceback of an internal error (exit code 7), set `FTDATA_DEBUG=1`.
"""
SECTIONS = (
    (
        "A file cannot be read",
        "`ftdata preview FILE` shows the first rows. The option `--format` sets the format of a file with an unknown "
        "suffix.",
        ("file_not_found", "no_reader", "not_json", "partial_file", "damaged_file", "encoding", "expansion", "no_rows"),
    ),
    (
        "Rows are rejected",
        "`ftdata preview FILE --odd -t MODEL` shows one rejected row of each kind. To continue without the rejected "
        "rows, set `--on-bad-rows quarantine`; `--max-rejects` limits their number. See [invalid "
        "rows](howto/bad-rows.md).",
        ("unknown_schema", "ambiguous_schema", "no_answer", "empty_answer", "no_labels", "overlong", "nothing_trained",
         "message_dropped", "template_raises", "content_type", "row_not_trained", "part_mask"),
    ),
    (
        "The template or the tokenizer is refused",
        "`ftdata templates check MODEL` examines a template without data. See [masks](masks.md).",
        ("no_template", "no_tokenizer", "bad_tokenizer", "template_limits", "nothing_marked",
         "ordinary_special_token"),
    ),
    (
        "The wrong tokens are trained",
        "`ftdata preview FILE -t MODEL` shows the trained tokens, and `ftdata audit FILE -t MODEL` finds the following "
        "problems:",
        ("no_trained_stop", "missing_final_stop", "empty_thinking", "answer_truncated", "message_truncated",
         "reasoning_dropped", "tools_dropped", "prompt_mismatch", "token_crosses_boundary",
         "generation_tags_unconfirmed",
         "double_bos", "double_eos", "control_tokens"),
    ),
    (
        "A build is refused, or it is not complete",
        "The report of a build counts every row and every token. If more than 1 % of the rows or tokens are left out, "
        "the report names the option that changes this. To continue an interrupted build, run the same command again.",
        ("build_exists", "target_exists", "max_rejects", "damaged_build", "no_rows_built", "file_changed",
         "workspace_unknown", "write"),
    ),
    (
        "The Hub or the network fails",
        "",
        ("hub", "hub_gated", "hub_offline", "hub_config", "hub_no_data", "network"),
    ),
    (
        "Training is refused, or it fails",
        "`ftdata train run.yaml --dry-run` checks a configuration and estimates the memory without training.",
        ("missing_train", "model_leaks", "out_of_memory", "diverged", "run_exists", "run_differs", "data_differs",
         "several_gpus", "remote_code", "no_safetensors", "pad_token"),
    ),
)  # fmt: skip


def problems(code, table):
    """Yield each problem that a code stands for, with its fix."""
    if code in FLAGS:
        yield FLAGS[code].sentence, FLAGS[code].fix
    elif code in checks:
        yield checks[code].message, checks[code].fix
    else:
        pairs = [(text, fix) for kind in table[code].values() for text, fix in kind.items() if text.strip("…:;, ")]
        yield from [pair for pair in pairs if pair[1]] or pairs


def page():
    """Return the page.

    Raises:
        KeyError: a section lists a code that does not exist.
    """
    table = dict(errors.codes())
    lines = [HEAD]
    for title, text, codes in SECTIONS:
        lines += [f"## {title}\n", *([f"{text}\n"] if text else []), "| code | problem | fix |", "|---|---|---|"]
        for code in codes:
            cells = [[f"`{code}`", *map(cell, problem)] for problem in problems(code, table)]
            lines += [f"| {' | '.join(row)} |" for row in cells]
        lines.append("")
    return "\n".join(lines)


def cell(text):
    return text.replace("|", "\\|").replace("\n", " ").strip()
