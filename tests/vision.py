"""Vision-language models for tests: a tokenizer of single bytes, a chat template, an image processor, tiny weights."""

import inspect
import json
import random
from importlib import import_module
from pathlib import Path

import pytest
import torch
import transformers
import trl
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.processing_utils import ProcessorMixin

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

SIMPLE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}\nPLACEHOLDER\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that prints a placeholder for each image. Models with M-RoPE need a separator between images."""

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
ROWS_AND_COLUMNS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
AYA = [
    "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL", *[f"TILE_{n}" for n in range(1, 13)],
]  # fmt: skip
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
GEMMA_AUDIO = {"boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}
GEMMA4 = {
    "boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>",
    "boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>",
}  # fmt: skip
INTERNVL = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip
GEMMA = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
LLAVA_SIZES = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
LLAVA = {"patch_size": 14, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}


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
    "aya_vision": (
        "AyaVisionProcessor",
        "GotOcr2ImageProcessorPil",
        {"size": {"height": 364, "width": 364}},
        {},
        {},
        ["<image>", *AYA],
    ),
    "mllama": ("MllamaProcessor", "MllamaImageProcessorPil", {}, {}, {}, ["<|image|>", "<|python_tag|>"]),
    "qwen2_vl": ("Qwen2VLProcessor", "qwen2_vl.Qwen2VL", {}, {}, {}, QWEN_TOKENS),
    "qwen2_5_vl with other sizes": (
        "Qwen2_5_VLProcessor", "qwen2_vl.Qwen2VL", {"min_pixels": 3136, "max_pixels": 401408}, {}, {}, QWEN_TOKENS,
    ),
    "qwen3_vl": (
        "Qwen3VLProcessor",
        "qwen2_vl.Qwen2VL",
        {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 1048576}},
        {},
        {},
        QWEN_TOKENS,
    ),
    "glm4v": ("Glm4vProcessor", "glm4v.Glm4v", {}, {}, {}, ["<|image|>", "<|video|>"]),
    "glm46v": ("Glm46VProcessor", "glm46v.Glm46V", {}, {}, {}, ["<|image|>", "<|video|>"]),
    "gemma3n": ("Gemma3nProcessor", "SiglipImageProcessorPil", {}, {}, {**GEMMA, **GEMMA_AUDIO}, []),
    "gemma4": ("Gemma4Processor", "gemma4.Gemma4", {}, {}, GEMMA4, []),
    "internvl": ("InternVLProcessor", "GotOcr2ImageProcessorPil", {}, {}, INTERNVL, []),
    "internvl with other sizes": (
        "InternVLProcessor", "GotOcr2ImageProcessorPil", {"size": {"height": 448, "width": 448}}, {}, INTERNVL, [],
    ),
}  # fmt: skip
"""Name -> processor, image processor, settings of both, names of tokens, and tokens. None of them needs torchvision for
images. Some of them need it for videos, which the tests do not use."""

_EXTRACTORS = {"Gemma3nProcessor": "Gemma3nAudioFeatureExtractor", "Gemma4Processor": "Gemma4AudioFeatureExtractor"}

_TEMPLATE_FILES = {"gemma3": "gemma3", "idefics3": "idefics3", "llava_next": "llava_next"}


def find_image_processor(name):
    """Return an image processor class of transformers: `Class`, or `model.Prefix`."""
    model, _, prefix = name.rpartition(".")
    if not model:
        return getattr(transformers, name)
    return getattr(
        import_module(f"transformers.models.{model}.image_processing_pil_{model}"), f"{prefix}ImageProcessorPil"
    )


def make_processor(name):
    """Return a processor of `PROCESSORS`, without the parts for videos."""
    processor_class, image_class, image_settings, settings, names, tokens = PROCESSORS[name]
    parts = {
        "image_processor": find_image_processor(image_class)(**image_settings),
        "tokenizer": byte_tokenizer(names, [*tokens, *CHAT_TOKENS]),
    }
    if processor_class in _EXTRACTORS:
        parts["feature_extractor"] = getattr(transformers, _EXTRACTORS[processor_class])()
    kind = getattr(transformers, processor_class)
    if "video_processor" in inspect.signature(kind).parameters:
        parts["video_processor"] = None
    with pytest.MonkeyPatch.context() as patch:
        # A processor without a part for videos cannot be made otherwise.
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        made = kind(**parts, **settings)
    made.get_attributes = lambda: [one for one in kind.get_attributes() if getattr(made, one) is not None]
    return made


def save_processor(name, folder, *, template=None):
    """Save a processor of `PROCESSORS` with a chat template to a folder. Return the processor."""
    processor = make_processor(name)
    family = name.split()[0]
    if template is None and family in _TEMPLATE_FILES:
        template = (TEMPLATES / f"{_TEMPLATE_FILES[family]}.jinja").read_text("utf-8")
    placeholder = {"gemma3": "<start_of_image>", "internvl": "<IMG_CONTEXT>"}.get(family) or processor.image_token
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


def save_mistral3(folder):
    """Save the files of a Mistral 3 model without weights. Its processor needs torchvision."""
    tokenizer = byte_tokenizer({}, [*CHAT_TOKENS, "[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    tokenizer.chat_template = SIMPLE.replace("PLACEHOLDER", "[IMG]")
    tokenizer.save_pretrained(folder)
    image_processor = find_image_processor("pixtral.Pixtral")(patch_size=14, size={"longest_edge": 280})
    image_processor.save_pretrained(folder)
    config = {"processor_class": "PixtralProcessor", "patch_size": 14, "spatial_merge_size": 2}
    (Path(folder) / "processor_config.json").write_text(json.dumps(config))


def save_image(path, size, color=(200, 30, 30)):
    """Save an image of one color, and return its path."""
    Image.new("RGB", size, color).save(path)
    return str(path)


_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}


def _llama(size):
    return transformers.LlamaConfig(vocab_size=size, **_TEXT)


def _configs(size, ids):
    """Return the configurations of tiny models, by the name of their processor in `PROCESSORS`, and of Qwen2.5-VL."""
    clip = transformers.CLIPVisionConfig(image_size=336, patch_size=14, **_VISION)
    llava = {"vision_config": clip, "text_config": _llama(size), "image_token_index": ids("<image>")}
    llava |= {"vision_feature_select_strategy": "default", "vision_feature_layer": -2}
    qwen_vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    # TRL multiplies the logits of Aya Vision by this scale, and transformers 5.24 does not.
    cohere = transformers.CohereConfig(vocab_size=size, logit_scale=1.0, **_TEXT)
    gemma = transformers.Gemma3TextConfig(vocab_size=size, head_dim=16, sliding_window=64, **_TEXT)
    siglip = transformers.SiglipVisionConfig
    qwen_tokens = {
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
    }
    return {
        "qwen": lambda: transformers.Qwen2_5_VLConfig(
            text_config={"vocab_size": size, "rope_parameters": _ROPE, **_TEXT},
            vision_config={**qwen_vision, "fullatt_block_indexes": [1], "window_size": 112},
            **qwen_tokens,
        ),
        "qwen2_vl": lambda: transformers.Qwen2VLConfig(
            text_config={"vocab_size": size, "rope_parameters": _ROPE, **_TEXT},
            vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2},
            **qwen_tokens,
        ),
        "qwen3_vl": lambda: transformers.Qwen3VLConfig(
            text_config={
                "vocab_size": size, "head_dim": 16, "rope_parameters": {**_ROPE, "mrope_interleaved": True}, **_TEXT,
            },
            vision_config={**qwen_vision, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
            **qwen_tokens,
        ),
        "glm4v": lambda: transformers.Glm4vConfig(
            text_config={"vocab_size": size, "head_dim": 16, "rope_parameters": _ROPE, **_TEXT},
            vision_config={**qwen_vision, "image_size": 56},
            image_token_id=ids("<|image|>"),
            video_token_id=ids("<|video|>"),
        ),
        "internvl with other sizes": lambda: transformers.InternVLConfig(
            text_config=_llama(size),
            vision_config={**_VISION, "image_size": [448, 448], "patch_size": [14, 14]},
            image_token_id=ids("<IMG_CONTEXT>"),
        ),
        "mistral3": lambda: transformers.Mistral3Config(
            text_config=transformers.MistralConfig(vocab_size=size, head_dim=16, **_TEXT),
            vision_config=transformers.PixtralVisionConfig(image_size=280, patch_size=14, **_VISION),
            image_token_index=ids("[IMG]"),
        ),
        "gemma4": lambda: transformers.Gemma4Config(
            text_config={
                "vocab_size": size, "head_dim": 16, "global_head_dim": 16, "sliding_window": 64,
                "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
                "layer_types": ["sliding_attention", "full_attention"], **_TEXT,
            },
            vision_config={**_VISION, "num_key_value_heads": 2, "head_dim": 16},
            image_token_id=ids("<|image|>"),
            boi_token_id=ids("<|image>"),
            eoi_token_id=ids("<image|>"),
        ),
        "llava": lambda: transformers.LlavaConfig(**llava),
        "llava_next": lambda: transformers.LlavaNextConfig(
            **llava, image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
        ),
        "gemma3": lambda: transformers.Gemma3Config(
            text_config=gemma,
            vision_config=siglip(image_size=224, patch_size=14, **_VISION),
            mm_tokens_per_image=256,
            image_token_index=ids("<image_soft_token>"),
            boi_token_index=ids("<start_of_image>"),
            eoi_token_index=ids("<end_of_image>"),
        ),
        "idefics3": lambda: transformers.Idefics3Config(
            text_config=_llama(size),
            vision_config={**_VISION, "image_size": 364, "patch_size": 14},
            image_token_id=ids("<image>"),
            scale_factor=2,
        ),
        "aya_vision": lambda: transformers.AyaVisionConfig(
            text_config=cohere,
            vision_config=siglip(image_size=364, patch_size=14, **_VISION),
            image_token_index=ids("<|IMG_PATCH|>"),
            downsample_factor=2,
        ),
    }  # fmt: skip


def save_vision_model(name, folder):
    """Save a tiny vision-language model with random weights, its tokenizer and its processor to a folder."""
    folder = Path(folder)
    if name == "qwen":
        limits = {"min_pixels": 28 * 28, "max_pixels": 28 * 28 * 16}
        save_qwen(folder, {"image_processor_type": "Qwen2VLImageProcessor", **limits})
    elif name == "mistral3":
        save_mistral3(folder)
    else:
        save_processor(name, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = _configs(len(tokenizer), tokenizer.convert_tokens_to_ids)[name]()
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.data.normal_(std=weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return str(folder)


COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (245, 245, 245)}


def save_colors(folder, rows, seed=0):
    """Save images of one color, and a file with a question about each image. Return the path of the file."""
    generator = random.Random(seed)
    data = []
    for number in range(rows):
        name = generator.choice(list(COLORS))
        size = generator.randrange(30, 120), generator.randrange(30, 120)
        color = tuple(min(255, max(0, value + generator.randrange(-10, 11))) for value in COLORS[name])
        save_image(Path(folder) / f"{number}.png", size, color)
        question = [{"type": "image"}, {"type": "text", "text": "Which color?"}]
        answer = [{"type": "text", "text": name}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        data.append({"messages": messages, "images": [f"{number}.png"]})
    path = Path(folder) / "colors.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path
