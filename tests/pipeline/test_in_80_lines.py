"""The 80 lines of the documentation give the same tokens and labels as ftdata."""

import importlib.util
from pathlib import Path

import pytest
import tokenizers

from ftdata import encode
from ftdata.tokenizing.load import load_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "in_80_lines.py"
LOOP = "{%- for message in messages %}"
TEMPLATES = {
    "chatml": LOOP + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "chatml, trimmed": LOOP + "<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "no line break after the stop token": LOOP + "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "instruction tags": "{{ bos_token or '' }}" + LOOP + "{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}",
    "names": LOOP + "{% if message.role == 'assistant' %}ASSISTANT: {{ message.content }}{{ eos_token }}"
    "{% else %}USER: {{ message.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "headings": LOOP + "{% if message.role == 'assistant' %}### Response:\n{{ message.content }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ message.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}",
    "slices": LOOP + "<|im_start|>{{ message['role'] }}\n{{ message['content'][:1] + message['content'][1:] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "questions and answers": LOOP + "{% if message.role == 'user' %}Q: {{ message.content }}\n"
    "{% else %}A: {{ message.content }}{{ eos_token }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}",
    "variables": "{% set begin = '<|im_start|>' %}{% set end = '<|im_end|>' %}" + LOOP + "{{ begin + message.role + '\n' }}"
    "{{ message.content }}{{ end + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ begin + 'assistant\n' }}{% endif %}",
    "text before the stop token": LOOP + "<|im_start|>{{ message.role }}\n{{ message.content }}\n<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
}  # fmt: skip
CONVERSATIONS = [
    [{"role": "user", "content": "What is 2+2?"}, {"role": "assistant", "content": "4"}],
    [
        {"role": "user", "content": "Hi, assistant!"},
        {"role": "assistant", "content": "Hello. What is it?"},
        {"role": "user", "content": "Hello. What is it?"},
        {"role": "assistant", "content": "An answer: café, 日本.\n\nTwo lines."},
    ],
]


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("in_80_lines", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_has_at_most_80_lines():
    assert len(PAGE.read_text().splitlines()) <= 80


@pytest.mark.parametrize("name", ["tiny_bpe", "tiny_metaspace", "tiny_wordpiece"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_page_gives_the_same_labels_as_encode(page, tokenizer_dir, name, template):
    folder = tokenizer_dir(name)
    tokenizer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    special_tokens = load_tokenizer(folder).special_tokens
    source = TEMPLATES[template].replace("<|im_end|>", special_tokens["eos_token"])
    compiled = page.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    for messages in CONVERSATIONS:
        (example,) = encode(messages, folder, source)
        ids, labels = page.encode(messages, compiled, tokenizer, **special_tokens)
        assert ids == example.input_ids.tolist()
        assert labels == example.labels.tolist()
        assert any(label != -100 for label in labels)
