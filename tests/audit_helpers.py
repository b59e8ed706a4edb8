"""Rows for the tests of audits, and a function that audits them."""

from ftdata import audit


def talk(*texts, system=None):
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *messages] if system else messages}


PLAIN = talk("a question", "an answer")


def rows(*given, **options):
    return [*given], options


def audit_rows(tokenizer, given, options):
    made = {name: options[name] for name in ("pad", "chat", "lstrip") if name in options}
    return audit(given, tokenizer(**made), **{name: value for name, value in options.items() if name not in made})
