"""Reports of `check_template`."""

from tokenizer_makers import CHATML

from ftdata import check_template

MARKED = (
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}"
)


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


def test_reports_contain_the_flags_of_generation_tags(tmp_path):
    """A file with tags that leave out the stop token is used, so the report must say so."""
    path = tmp_path / "tagged.jinja"
    path.write_text(CHATML.replace("{{ message.content }}", MARKED))
    assert check_template(path).flags == ("generation_tags_unconfirmed", "no_trained_stop")
    path.write_text(CHATML)
    assert check_template(path).flags == ()


def test_rewritten_text_before_an_answer_is_the_reason():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n</think>"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n</think>{% endif %}"
    )
    (reason,) = check_template(source).reasons
    assert "the text before the first answer ends with" in reason
    assert "</think>'" in reason


def test_templates_that_leave_out_earlier_reasoning_split_conversations():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.reasoning_content %}<think>"
        "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    report = check_template(source)
    assert (report.verdict, report.prefix_stable) == ("split", False)
    assert "<think>first thought</think>first answer" in report.reasons[0]


def test_template_that_moves_the_system_message_is_reported():
    """Conversations with a system message are split, although other conversations are prefix-stable."""
    source = (
        "{% if messages[0].role == 'system' %}{% set rule, rest = messages[0].content, messages[1:] %}"
        "{% else %}{% set rule, rest = '', messages %}{% endif %}{% for m in rest %}"
        "{% if m.role == 'user' %}<|im_start|>user\n{% if loop.last or loop.index == rest | length - 1 %}{{ rule }}"
        "{% endif %}{{ m.content }}<|im_end|>\n{% else %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    report = check_template(source)
    assert (report.prefix_stable, report.rewrites) == (True, ("system_turns",))
    assert "yes, but not for conversations with a system message" in str(report)
