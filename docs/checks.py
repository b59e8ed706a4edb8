"""Write `checks.md`: every check of `ftdata audit`, out of its registry.

python docs/checks.py > docs/checks.md
"""

from ftdata.look.checks import checks

OF = {
    "flag": "examples",
    "row": "a row",
    "data": "all rows",
    "template": "tokenizer, template",
}
HEAD = """# What `ftdata audit` looks for

    ftdata audit data.jsonl --tokenizer MODEL                   # exit code 1 if anything is found
    ftdata audit train.jsonl -t MODEL --against test.jsonl      # no row of the test set may be trained on
    ftdata audit built                                          # a build: the tokens and labels that it holds
    ftdata audit data.jsonl -t MODEL --near 0.8 --pii           # what is looked for when asked only
    ftdata audit data.jsonl -t MODEL --ignore script --fail-on warning --format github

An *error* says that what is trained is wrong, a *warning* that it likely is, a *note* what is good to know. Rows that
are [refused](errors.md) are errors, by their own codes, even where a check of the same code is a warning. `--format` is
`text`, `json`, `sarif` (2.1.0) or `github` (annotations); each finding names its first ten rows (as text five) by file
and line, or row. Codes stay as they are. In Python: `ftdata.audit(...)` returns the same report.

Rows of splits that are not for training, and of `--against`, are held out: they are compared with those that are
trained on, token by token; `--near` compares words. Rows of a build are those of the data that it was made of,
wherever packs hold their examples. Checks marked † need messages, or what was decided when a build was made, so a
build is not asked for them.

| code | severity | of | says | way out | asked by |
|---|---|---|---|---|---|
"""


def main():
    lines = []
    for one in checks.values():
        code = f"`{one.code}`{' †' if one.of_messages else ''}"
        asked = f"`--{one.asked}`" if one.asked else ""
        lines.append(f"| {code} | {one.severity} | {OF[one.of]} | {one.says} | {one.fix} | {asked} |")
    print(HEAD + "\n".join(lines))


if __name__ == "__main__":
    main()
