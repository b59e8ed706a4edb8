"""Create a tiny language model for the demo and for tests, without a download.

    python examples/make_tiny_model.py examples/faq.json out/tiny

The script trains a byte-level BPE tokenizer on the texts of the data file, and a Llama model with half a million
weights. The model is trained for a few seconds to repeat the message of the user. It therefore has learned the
vocabulary and the chat format, but no answers; fine-tuning adds the answers.
"""

import argparse
import logging
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from ftdata import read

# bitsandbytes reports an optional package when it is imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
try:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
except ImportError as error:
    sys.exit(f"{error.name} is not installed. Fix: pip install 'ftdata[train]'")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1536,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator([*texts, *["system\nuser\nassistant\n"] * 20], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>", "<|endoftext|>"],
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int) -> LlamaForCausalLM:
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    chosen, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * max(0.05, 1 - step / steps)
        echoes = [
            [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            for text in chosen.choices(texts, k=6)
        ]
        batch = tokenizer(
            [tokenizer.apply_chat_template(echo, tokenize=False) for echo in echoes],
            padding=True,
            padding_side="right",
            return_tensors="pt",
            add_special_tokens=False,
        )
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1}/{steps}, loss {loss.item():.2f}", flush=True)
    return model


def find_texts(value: object) -> Iterator[str]:
    """Yield the texts of a row, at most 400 characters of each, without the roles of messages."""
    if isinstance(value, str):
        yield value[:400]
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from find_texts(item) if name != "role" else ()
    elif isinstance(value, list):
        for item in value:
            yield from find_texts(item)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="data file, for example with questions and answers or with messages")
    parser.add_argument("folder", type=Path, help="output folder for the tokenizer and the model")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    texts = [text for row in read(arguments.data) for text in find_texts(row.data)]
    tokenizer = make_tokenizer(texts)
    tokenizer.save_pretrained(arguments.folder)
    make_model(tokenizer, texts, arguments.steps).save_pretrained(arguments.folder)
    print(f"wrote {arguments.folder}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
