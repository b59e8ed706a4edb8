"""A row of every schema, which every file format must return unchanged."""

TALK = [{"role": "user", "content": "[1] café, “q”\n"}, {"role": "assistant", "content": "007"}]


CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


TOOLED = [
    TALK[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "r"},
    TALK[1],
]


TOOLS = [{"type": "function", "function": {"name": "f", "description": "NA"}}]


GIVEN = [{"from": "human", "value": TALK[0]["content"]}, {"from": "gpt", "value": "007"}]


SHAPES = {
    "messages": {"messages": TALK},
    "messages, tools": {"messages": TOOLED, "tools": TOOLS},
    "sharegpt": {"conversations": GIVEN, "system": "2024-01-01"},
    "prompt, completion": {"prompt": TALK[0]["content"], "completion": "007"},
    "prompt, completion (chat)": {"prompt": TALK[:1], "completion": TALK[1:]},
    "preference": {"prompt": TALK[0]["content"], "chosen": "007", "rejected": "NA"},
    "alpaca": {"instruction": "007", "input": "NA", "output": "1e5", "history": [["true", "null"]]},
    "question, answer": {"question": "007", "answer": "2024-01-01"},
    "text": {"text": "NA"},
    "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    "chat log": {"dialog": TALK, "id": "007"},
}
