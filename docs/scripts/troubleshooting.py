"""Generate `docs/troubleshooting.md`: common problems by topic, with fixes from the source code."""

import errors

from ftdata.inspection.checks import checks
from ftdata.pipeline.flags import FLAGS
from ftdata.spelling import spell_options

HEAD = """# Troubleshooting

This page lists common problems with their fixes. An error message contains its code in brackets, its location and
its fix:

    ftdata: [no_template] MODEL: the tokenizer has no chat template. Fix: pass template= with one of ...

Search for the code on this page, or see all [errors](reference/errors.md) and [flags](reference/flags.md). `…`
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
        "`ftdata preview FILE --outliers -t MODEL` shows outliers, and one rejected row for each error code. To "
        "continue without the rejected rows, set `--on-bad-rows quarantine`; `--max-rejects` limits their number. See "
        "[invalid rows](howto/bad-rows.md).",
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
        "A build is refused or incomplete",
        "The report of a build counts every row and every token. If more than 1 % of the rows or tokens are left out, "
        "the report names the option that keeps them. To continue an interrupted build, run the same command again.",
        ("build_exists", "target_exists", "max_rejects", "damaged_build", "no_rows_built", "file_changed",
         "workspace_unknown", "write"),
    ),
    (
        "The Hub or the network fails",
        "",
        ("hub", "hub_gated", "hub_offline", "hub_config", "hub_no_data", "network"),
    ),
    (
        "Training is refused or fails",
        "`ftdata train run.yaml --dry-run` checks a configuration and estimates the memory without training.",
        ("missing_train", "model_leaks", "out_of_memory", "diverged", "run_exists", "run_in_use", "run_differs",
         "data_differs", "several_gpus", "remote_code", "no_safetensors", "pad_token"),
    ),
)  # fmt: skip


WRITTEN = {
    "ambiguous_schema": [
        ("the row matches several schemas", "choose a schema with the option schema"),
        ("the row has several columns with messages", "choose a column, for example columns={'messages': 'chat'}"),
    ],
    "unknown_schema": [
        ("the row matches no schema", "map its columns, e.g. columns={'answer': 'reply'}, or write a schema function"),
    ],
    "empty_answer": [("an answer has no visible text", "remove the row, or set train: false in the message")],
    "no_labels": [("the row contains tokens, but no labels", "add a column with labels or a mask")],
    "not_json": [
        ("the file is not JSON, for example a web page", "download the raw file, or correct its suffix"),
        ("the file is a Git LFS pointer", "run git lfs pull"),
        ("the row contains a value that JSON does not support, such as NaN", "replace the value, or remove the row"),
    ],
    "partial_file": [("the file ends in the middle of a row or of compressed data", "copy or write the file again")],
    "bad_tokenizer": [("the tokenizer cannot be loaded, or it fails", "fix tokenizer.json, or use another tokenizer")],
    "no_tokenizer": [
        ("no tokenizer was passed", "pass the tokenizer of the model with tokenizer="),
        ("the folder does not exist, or it contains no tokenizer", "pass a folder with a tokenizer, or a Hub id"),
    ],
    "nothing_marked": [
        ("a prompt template marks no text to train",
         "put {% generation %} before the response, and {% endgeneration %} after its stop token"),
    ],
    "target_exists": [("the output exists, and ftdata did not create it", "choose another output, or remove it")],
    "max_rejects": [
        ("more rows are rejected than max_rejects allows", "fix the rows, or raise max_rejects"),
        ("on_bad_rows='quarantine' needs max_rejects", "set for example max_rejects='1%'"),
    ],
    "hub": [("the request to the Hub failed", "check the network; for a local file, check the path")],
    "hub_config": [
        ("the data set has several configurations, but no default", "set name to one of them"),
        ("the data set has no configuration with this name", "remove name, or set it to one of the listed names"),
    ],
    "file_not_found": [
        ("no local file matches the path", "check the path; the message lists similar names"),
        ("the data set on the Hub has no such file", "check the file name, or upload files first"),
    ],
    "damaged_file": [("the file cannot be read to its end", "copy or download it again, or save it again")],
    "encoding": [("the file contains bytes that are not valid in its encoding", "set encoding, for example cp1252")],
    "expansion": [
        ("the file expands to many times its size, as a decompression bomb does",
         "decompress it yourself, or write it again without empty rows and columns"),
    ],
    "no_rows": [("the file contains no rows, or where or limit selects no row", "check the data and these options")],
    "no_answer": [("the row has no assistant message", "add an answer, or remove the row")],
    "overlong": [
        ("the example has more tokens than max_length",
         "raise max_length, or set overlong='drop_turns' or overlong='truncate'"),
    ],
    "nothing_trained": [("the row has no trained token", "check train_on, train_parts and the train fields")],
    "template_raises": [
        ("the template fails on this row; the message contains its reason",
         "correct the row, for example the order of its messages, or use another template"),
    ],
    "content_type": [("a field of a message is not text or a list of text parts", "convert the field to text")],
    "row_not_trained": [
        ("the row is marked as undesirable or as excluded", "select rows with where, or remove the field"),
    ],
    "no_rows_built": [("all rows are rejected or filtered", "see the reasons in the message")],
    "write": [
        ("a file cannot be written", "check the permissions and the free disk space"),
        ("too many files are open", "increase the limit of open files: ulimit -n 1024"),
    ],
}  # fmt: skip
"""Problems whose messages are too general or too many to list."""


def list_problems(code, table):
    """Return each problem that a code stands for, with its fix."""
    if code in FLAGS:
        return [(FLAGS[code].sentence, FLAGS[code].fix)]
    if code in checks:
        return [(checks[code].message, checks[code].fix)]
    messages = [pair for kind in table[code].values() for pair in kind.items()]
    return WRITTEN.get(code, messages)


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
            for problem, fix in list_problems(code, table):
                lines.append(f"| `{code}` | {escape_cell(problem)} | {escape_cell(fix)} |")
        lines.append("")
    return "\n".join(lines)


def escape_cell(text):
    """Escape the separator of table cells, and use flags of the command line for options."""
    return spell_options(text, "flags").replace("|", "\\|").replace("\n", " ").replace("……", "…").strip()
