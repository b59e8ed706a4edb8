"""The flags that an example can have, and the sentence that the build report prints for each flag."""

FLAGS = {
    "arguments_as_text": "{n} examples: tool call arguments are passed as JSON text, because the template fails on "
    "objects",
    "arguments_parsed": "{n} examples: tool call arguments are passed as objects, because the template encodes JSON "
    "text a second time",
    "message_truncated": "{n} examples: the template omits part of a message",
    "control_tokens": "{n} examples: the data contains the text of control tokens; it is tokenized as plain text",
    "empty_thinking": "{n} examples: an empty thinking block is trained, because the template prints one for messages "
    "without reasoning; set enable_thinking=false to move it to the prompt, or add reasoning to the data",
    "eos_appended": "{n} examples: a stop token is appended, because the template does not print one at the end",
    "fields_dropped": "{n} examples: the template does not print some keys of the messages",
    "text_after_last_stop": "{n} examples end with template text after the last stop token; it is not trained",
    "no_trained_stop": "{n} examples: a turn does not end with a trained control token, so the model does not learn "
    "to stop",
    "content_parts_joined": "{n} examples: a list with a single text part is passed as text, because the template "
    "accepts only text",
    "message_dropped": "{n} examples: the template omits a whole message",
    "pretokenized": "{n} examples come from pretokenized rows; their tokens are checked and used unchanged",
    "prompt_mismatch": "{n} examples lack template text that the generation prompt contains, such as an opening "
    "thinking tag",
    "reasoning_dropped": "{n} examples: the template does not print the reasoning",
    "rejected_side_dropped": "{n} examples are the chosen side of a preference pair; the rejected side is not used",
    "history_rewritten": "{n} examples: the template renders an earlier turn differently than the model wrote it",
    "conversation_split": "{n} examples come from split conversations: the template rewrites earlier turns, so each "
    "group of turns is its own example ({repeated} tokens repeat)",
    "stop_outside_generation_tags": "{n} examples: the stop token is trained although it is outside the template's "
    "generation tags",
    "token_crosses_boundary": "{n} examples: a trained token crosses the answer's boundary",
    "generation_tags_overruled": "{n} examples are trained on the text that the model must generate, including the "
    "stop token, because the template's generation tags mark a different text",
    "generation_tags_unconfirmed": "{n} examples are trained on the text inside the template's generation tags, which "
    "differs, or may differ, from the text that the model must generate",
    "tools_dropped": "{n} examples: the template omits tool definitions, in full or in part",
    "trailing_messages": "{n} examples end with messages that have no answer",
    "answer_truncated": "{n} examples end in the middle of an answer",
    "history_not_compared": "{n} examples: an earlier turn cannot be compared with the text that the model wrote, "
    "because the template fails on the conversation up to that turn",
    "missing_final_stop": "{n} examples end without a stop token: the template prints it only before the next message",
    "template_not_probed": "{n} examples were checked individually: the template fails on simple conversations, so it "
    "cannot be probed",
    "whitespace_removed": "{n} examples: a control token of the tokenizer removes whitespace of the row (lstrip or "
    "rstrip)",
}
"""Map each flag to its sentence in the report."""
