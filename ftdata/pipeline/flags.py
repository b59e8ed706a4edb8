"""The flags that an example can have. Reports, audit findings, outliers and the docs derive from this table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ftdata.errors import count_noun

SEVERITIES = ("note", "warning", "error")
"""The severities of flags and audit checks, in ascending order."""


@dataclass(frozen=True, slots=True)
class Flag:
    """A property that an example can have.

    Attributes:
        severity: `"error"`, `"warning"` or `"note"` if `audit` reports rows with this flag; otherwise empty.
        sentence: a description of the property.
        fix: the fix, in the imperative; empty if there is nothing to fix.
        outlier: the kind of outlier that rows with this flag belong to; empty if they are not outliers.
        contradicts: statements about the data that are false if an example has the flag. A summary contains the
            statements that no flag contradicts.
    """

    severity: str
    sentence: str
    fix: str = ""
    outlier: str = ""
    contradicts: tuple[str, ...] = ()


_NO_STOP, _REWRITTEN = "no stop token", "rewritten by the template"
_NOT_PRINTED = "not fully printed by the template"
_ALL_PRINTED = "the template prints all messages completely"
_ALL_STOP = "every trained turn ends with a trained stop token"

FLAGS = {
    "no_trained_stop": Flag(
        "error",
        "a trained turn does not end with a trained control token, so the model does not learn to stop",
        "use a template that prints a control token after every turn, inside the generation tags if there are any; "
        "with train_parts, also train the last part of a turn; for conversations with a single turn, "
        "on_missing_stop='append_eos' also works",
        _NO_STOP,
        (_ALL_STOP,),
    ),
    "answer_truncated": Flag(
        "error",
        "max_length cuts an answer in the middle, so the model learns to stop in mid-sentence",
        "raise max_length, or shorten the rows; or set overlong='drop_turns', which leaves out answers that do not fit",
        "answer truncated",
        ("no answer is truncated", _ALL_STOP),
    ),
    "missing_final_stop": Flag(
        "warning",
        "the last turn has no stop token, because the template prints it only before the next message",
        "set on_missing_stop='append_eos' to append and train the EOS token",
        _NO_STOP,
        (_ALL_STOP,),
    ),
    "message_truncated": Flag(
        "warning",
        "the template prints only part of a message",
        "run `ftdata preview --outliers` to see the missing text, and use a template that prints it",
        _NOT_PRINTED,
        (_ALL_PRINTED,),
    ),
    "message_dropped": Flag(
        "warning",
        "the template does not print a system, user or tool message",
        "use a template that prints it",
        _NOT_PRINTED,
        (_ALL_PRINTED,),
    ),
    "reasoning_dropped": Flag(
        "warning",
        "the template does not print the reasoning",
        "use a template that prints reasoning, or remove the reasoning from the data; if turns='joint' is set and the "
        "template prints only the last reasoning, set turns='auto'",
        _NOT_PRINTED,
        (_ALL_PRINTED,),
    ),
    "tools_dropped": Flag(
        "warning",
        "the template does not print the tool definitions, or omits some of their names or parameters",
        "use a template that prints tools, or remove the tools from the data",
        _NOT_PRINTED,
        (_ALL_PRINTED,),
    ),
    "history_rewritten": Flag(
        "warning",
        "a joint example trains an earlier turn that the template renders differently than the model wrote it",
        "set turns='auto' to make one example per turn",
        _REWRITTEN,
    ),
    "fields_dropped": Flag(
        "note",
        "the template does not print some keys of the messages",
        "remove the keys from the data if the model does not need them; otherwise use a template that prints them",
    ),
    "prompt_mismatch": Flag(
        "warning",
        "the text lacks template text that the generation prompt contains at inference, such as a thinking tag",
        "set a template variable with which the text and the generation prompt agree, such as --template-kwarg "
        "enable_thinking=true, or in single rows the column chat_template_kwargs; or add reasoning to the data if the "
        "generation prompt opens a thinking block, and remove it if the prompt closes the block",
    ),
    "empty_thinking": Flag(
        "warning",
        "an empty thinking block is trained, because the template prints it for messages without reasoning",
        "pass --template-kwarg enable_thinking=false if the template supports it and no row has reasoning, which moves "
        "the block to the prompt; or add reasoning to the data; keep it only if the model should learn not to think",
        contradicts=("no empty thinking block is trained",),
    ),
    "token_crosses_boundary": Flag(
        "warning",
        "a trained token also contains text that is not trained: the end of the prompt or, with train_parts, the end "
        "of another part",
        "remove whitespace at the start of the answers, or use a template whose prompt ends with a control token; in a "
        "prompt template, move the space before the answer into the generation tags; with train_parts, also train the "
        "part before",
        contradicts=("no trained token crosses the boundary of an answer",),
    ),
    "whitespace_removed": Flag(
        "warning",
        "a control token of the tokenizer removes whitespace of the row (lstrip or rstrip), which no token contains",
        "remove the whitespace from the data, or set lstrip and rstrip of the token to false in tokenizer.json",
    ),
    "unknown_token": Flag(
        "warning",
        "the text contains characters that the tokenizer does not know, and encodes as its unknown token",
        "remove these characters from the data, or use a tokenizer that encodes unknown characters as bytes",
    ),
    "rejected_side_dropped": Flag(
        "note",
        "the example is the chosen side of a preference pair; the rejected side is not used",
        "ignore this note if you want supervised fine-tuning on the chosen side; or build with task='preference'",
    ),
    "generation_tags_unconfirmed": Flag(
        "warning",
        "the text inside the template's generation tags is trained, although the model might not generate it",
        "correct the generation tags of the template, or remove them; the template must print the header of an answer "
        "if add_generation_prompt is set, so that ftdata can locate turns",
    ),
    "header_trained": Flag(
        "warning",
        "the template does not print the header of an answer as the generation prompt, so the header is trained",
        "at the end of the template, print the header inside {% if add_generation_prompt %}{% endif %}",
    ),
    "stop_outside_generation_tags": Flag(
        "note",
        "the generation tags of the tokenizer's template exclude the stop token; ftdata trains it anyway",
        "move the stop token inside the generation tags of the template",
    ),
    "control_tokens": Flag(
        "warning",
        "the data contains the text of control tokens, which is tokenized as plain text",
        "remove it from the data, unless the text is about such tokens: it can be left over from a template",
        "control tokens in the text",
        ("no row contains the text of a control token",),
    ),
    "trailing_messages": Flag(
        "warning",
        "the conversation ends with messages that have no answer",
        "remove these messages from the data",
    ),
    "conversation_split": Flag(
        "",
        "the conversation is split, because the template rewrites earlier turns: each group of turns is an example",
        "",
        _REWRITTEN,
    ),
    "history_not_compared": Flag(
        "",
        "an earlier turn cannot be compared with the text that the model wrote, because the template fails on the "
        "conversation up to that turn",
    ),
    "template_not_probed": Flag(
        "",
        "the example is checked individually: the template fails on simple conversations, so it cannot be probed",
    ),
    "generation_tags_overruled": Flag(
        "",
        "the text that the model must generate is trained, including the stop token, because the template's generation "
        "tags mark a different text",
    ),
    "eos_appended": Flag("", "the EOS token is appended, because the text does not end with a stop token"),
    "text_after_last_stop": Flag("", "the template prints text after the last stop token; it is not trained"),
    "arguments_as_text": Flag(
        "",
        "tool call arguments are passed as JSON text, because the template fails on objects",
    ),
    "tool_call_ids_added": Flag(
        "note",
        "tool call ids are generated, because the template requires an id for each tool call",
        "add ids to the data if the model must produce ids in a specific format",
    ),
    "empty_content_added": Flag(
        "",
        "messages with tool calls get an empty content, because the template fails without content",
    ),
    "arguments_parsed": Flag(
        "",
        "tool call arguments are passed as objects, because the template encodes JSON text a second time",
    ),
    "role_replaced": Flag(
        "",
        "tool results with another role, such as observation, are passed with the role tool, because the template does "
        "not support the other role",
    ),
    "content_parts_joined": Flag(
        "",
        "a list with a single text part is passed as text, because the template accepts only text",
    ),
    "content_as_parts": Flag(
        "",
        "the texts of messages are passed as lists with a text part, because the template accepts only lists",
    ),
    "content_parts_merged": Flag(
        "note",
        "the text parts of a message are joined with line breaks, because the template accepts only text (as in vLLM)",
        "to use another separator, join the parts in the data",
    ),
    "pretokenized": Flag("", "the row contains tokens and labels, which are checked and used unchanged"),
}
"""Map each code to its flag. Audit findings of equal severity are printed in this order."""


def describe_flags(
    counts: Mapping[str, int], repeated_tokens: int = 0, *, trains_repeats: bool = False
) -> Iterator[str]:
    """Yield one sentence for each flag with the number of examples that have the flag.

    Args:
        counts: the number of examples with each flag.
        repeated_tokens: the number of tokens that repeat because a conversation is split into several examples.
        trains_repeats: whether these tokens are trained in each example, because of `train_on='all'`.

    >>> list(describe_flags({"trailing_messages": 1200}))
    ['1,200 examples: the conversation ends with messages that have no answer']
    """
    for code, count in sorted(counts.items()):
        if code in FLAGS:
            has_repeats = code == "conversation_split" and repeated_tokens
            trained = ", and train_on='all' trains each repetition" if trains_repeats else ""
            repeats = f" ({repeated_tokens:,} tokens repeat{trained})" if has_repeats else ""
            yield f"{count_noun(count, 'example')}: {FLAGS[code].sentence}{repeats}"
