"""Reports of `check_template`."""

from ftdata import check_template


def test_template_reports_contain_verdict_and_properties(tokenizer_dir):
    exact = check_template(tokenizer_dir("deepseek"))
    assert (exact.verdict, exact.prefix_stable) == ("exact", True)
    split = check_template(tokenizer_dir("qwen"))
    assert (split.verdict, split.prefix_stable, split.stop) == ("split", False, "<|im_end|>")
    assert "<think>" in split.reasons[0]
    assert "tools" not in split.lacks
    assert split.rewrites == ("turns", "reasoning", "think_tags")
    assert exact.proved > len(exact.lacks)
    refused = check_template("{{ raise_exception('never') }}{{ messages }}")
    assert refused.verdict == "refused"
    assert "never" in refused.reasons[0]
    assert check_template("alpaca").kind == "prompt"
