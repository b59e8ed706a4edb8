"""Folders of vision-language models for tests: a tokenizer of single bytes, a chat template and an image processor."""

import json
from pathlib import Path

import transformers
import trl
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

SIMPLE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that prints a placeholder for each image."""

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
ROWS_AND_COLUMNS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
AYA = [
    "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL", *[f"TILE_{n}" for n in range(1, 13)],
]  # fmt: skip
GEMMA = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
LLAVA_SIZES = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
LLAVA = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def byte_tokenizer(names, tokens):
    """Return a tokenizer that gives the text back if its ids are decoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, extra_special_tokens=names)
    fast.add_special_tokens({"additional_special_tokens": tokens})
    return fast


PROCESSORS = {
    "gemma3": ("Gemma3Processor", "Gemma3ImageProcessorPil", {}, {}, GEMMA, []),
    "idefics3": ("Idefics3Processor", "Idefics3ImageProcessorPil", {}, {}, {}, ["<global-img>", *ROWS_AND_COLUMNS]),
    "idefics3 with other sizes": (
        "Idefics3Processor",
        "Idefics3ImageProcessorPil",
        {"size": {"longest_edge": 1500}, "max_image_size": {"longest_edge": 512}},
        {"image_seq_len": 64},
        {},
        ["<global-img>", *ROWS_AND_COLUMNS],
    ),
    "idefics3 without tiles": (
        "Idefics3Processor",
        "Idefics3ImageProcessorPil",
        {"do_image_splitting": False},
        {},
        {},
        ["<global-img>"],
    ),
    "llava": ("LlavaProcessor", "LlavaImageProcessorPil", LLAVA_SIZES, LLAVA, {}, ["<image>"]),
    "llava without a crop": (
        "LlavaProcessor",
        "LlavaImageProcessorPil",
        {"do_pad": True, "do_center_crop": False, "size": {"height": 384, "width": 384}},
        {"patch_size": 14, "vision_feature_select_strategy": "full"},
        {},
        ["<image>"],
    ),
    "llava_next": ("LlavaNextProcessor", "LlavaNextImageProcessorPil", LLAVA_SIZES, LLAVA, {}, ["<image>"]),
    "aya_vision": ("AyaVisionProcessor", "GotOcr2ImageProcessorPil", {}, {}, {}, ["<image>", *AYA]),
    "mllama": ("MllamaProcessor", "MllamaImageProcessorPil", {}, {}, {}, ["<|image|>", "<|python_tag|>"]),
}  # fmt: skip
"""Name -> processor, image processor, settings of both, names of tokens, and tokens. None of them needs torchvision."""

_TEMPLATE_FILES = {"gemma3": "gemma3", "idefics3": "idefics3", "llava_next": "llava_next"}


def make_processor(name, *, template=None):
    """Return a processor of `PROCESSORS`."""
    processor_class, image_class, image_settings, settings, names, tokens = PROCESSORS[name]
    image_processor = getattr(transformers, image_class)(**image_settings)
    tokenizer = byte_tokenizer(names, [*tokens, *CHAT_TOKENS])
    return getattr(transformers, processor_class)(image_processor, tokenizer, chat_template=template, **settings)


def save_processor(name, folder, *, template=None):
    """Save a processor of `PROCESSORS` with a chat template to a folder. Return the processor."""
    processor = make_processor(name)
    family = name.split()[0]
    if template is None and family in _TEMPLATE_FILES:
        template = (TEMPLATES / f"{_TEMPLATE_FILES[family]}.jinja").read_text("utf-8")
    placeholder = getattr(processor, "boi_token" if family == "gemma3" else "image_token")
    processor.chat_template = processor.tokenizer.chat_template = template or SIMPLE.replace("PLACEHOLDER", placeholder)
    processor.save_pretrained(folder)
    return processor


def save_qwen(folder, settings=None):
    """Save the files of a Qwen2.5-VL model without weights. Its processor needs torchvision."""
    tokenizer = byte_tokenizer({}, [*CHAT_TOKENS, *QWEN_TOKENS])
    tokenizer.chat_template = (TEMPLATES / "qwen2_5_vl.jinja").read_text("utf-8")
    tokenizer.save_pretrained(folder)
    config = {"processor_class": "Qwen2_5_VLProcessor", **(settings or {})}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config))
    return str(folder)


def save_image(path, size, color=(200, 30, 30)):
    """Save an image of one color, and return its path."""
    Image.new("RGB", size, color).save(path)
    return str(path)
