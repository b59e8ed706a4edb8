"""Records of Claude Code sessions for tests."""


def record(kind, uuid, parent, content=None, *, message=None, **values):
    if content is not None:
        message = {"role": kind, "content": content, **(message or {})}
    fields = {"message": message} if message is not None else {}
    return {"type": kind, "uuid": uuid, "parentUuid": parent, "sessionId": "s", "version": "2.1", **fields, **values}


def user(uuid, parent, content, **values):
    return record("user", uuid, parent, content, **values)


def assistant(uuid, parent, *blocks, response=None, **values):
    message = {"id": response or uuid, "model": "m"}
    return record("assistant", uuid, parent, list(blocks), message=message, **values)


def text(value):
    return {"type": "text", "text": value}


def call(call_id, **arguments):
    return {"type": "tool_use", "id": call_id, "name": "Bash", "input": arguments}


def result(call_id, content, **values):
    return {"type": "tool_result", "tool_use_id": call_id, "content": content, **values}


QUESTION, ANSWER = user("u", None, "q"), assistant("a", "u", text("yes"))
