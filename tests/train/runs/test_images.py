"""Training on images: the model gets each image at its tokens, packed documents are isolated, and the model learns."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cases import mostly_long
from PIL import Image

from ftdata import build_sft_dataset
from ftdata.build.dataset import load_build, write_build
from ftdata.errors import InputRefused, UsageError
from ftdata.exporters.export import export

pytest.importorskip("trl")
pytestmark = pytest.mark.train

import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from transformers import AutoTokenizer, MllamaConfig, MllamaForConditionalGeneration  # noqa: E402
from vision import save_colors, save_image, save_processor, save_vision_model  # noqa: E402

from ftdata.train import compare, generate, merge  # noqa: E402
from ftdata.train import run as train  # noqa: E402
from ftdata.train.model.isolation_probe import (  # noqa: E402
    has_leaking_architecture,
    measure_leak,
    mixes_packed_images,
)
from ftdata.train.model.load import load_model, load_model_config  # noqa: E402
from ftdata.train.model.vision import REFERENCES_COLUMN, make_image_collator  # noqa: E402

FAMILIES = [
    "qwen", "qwen2_vl", "qwen3_vl", "glm4v", "gemma3", "gemma4", "idefics3", "llava", "llava_next", "mistral3",
    "internvl with other sizes", "aya_vision",
]  # fmt: skip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            made[name] = save_vision_model(name, tmp_path_factory.mktemp("models") / name)
        return made[name]

    return get


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    return save_colors(tmp_path_factory.mktemp("colors"), 150)


def read_rows(folder, split="train"):
    rows = load_build(Path(folder))[split].rename_columns({"images": REFERENCES_COLUMN})
    return [rows[number] for number in range(len(rows))]


def make_collator(model, folder, build, *, padding_free):
    return make_image_collator(
        model, AutoTokenizer.from_pretrained(folder), Path(folder), Path(build), padding_free=padding_free
    )


def compute_logits(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits


@pytest.mark.parametrize("name", mostly_long(FAMILIES, "qwen", "gemma3", "llava"))
def test_logits_of_packed_and_padded_rows_equal_those_of_single_rows(name, model_folder, tmp_path):
    folder = model_folder(name)
    model = load_model(folder).eval()
    sizes = [(300, 200), (64, 640), (50, 50), (31, 90)]
    paths = [save_image(tmp_path / f"{n}.png", size, (60 * n, 200 - 40 * n, 30)) for n, size in enumerate(sizes)]
    rows = []
    for images in ([paths[0]], [], paths[1:3], [paths[3]]):
        question = [*({"type": "image", "image": path} for path in images), {"type": "text", "text": "What?"}]
        answer = [{"type": "text", "text": f"{len(images)} images."}]
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    write_build(rows, folder, tmp_path / "build")
    rows = read_rows(tmp_path / "build")
    padded, packed = (make_collator(model, folder, tmp_path / "build", padding_free=free) for free in (False, True))
    alone = [compute_logits(model, padded([row]))[0] for row in rows]
    largest = max(float(logits.abs().max()) for logits in alone)
    together = compute_logits(model, padded(rows))
    for logits, row in zip(alone, together, strict=True):
        assert float((row[: len(logits)] - logits).abs().max()) < 1e-4 * largest
    # The probe finds out whether the documents of a packed sequence are isolated.
    is_isolated = float((compute_logits(model, packed(rows))[0] - torch.cat(alone)).abs().max()) < 1e-4 * largest
    assert is_isolated != mixes_packed_images(model, packed, [rows[0], rows[2]])
    assert is_isolated or name == "gemma3"
    assert measure_leak(model) == 0
    # Each image matters: other pixels change the logits.
    changed = [Image.new("RGB", sizes[0], "white")]
    other = compute_logits(model, padded.collate([rows[0]], changed))[0]
    assert float((other - alone[0]).abs().max()) > 1e-3 * largest
    # With another number of features than tokens, the model raises an error.
    with pytest.raises((InputRefused, ValueError, RuntimeError, IndexError)):
        compute_logits(model, padded.collate([rows[2]], changed))


SYSTEM = "system\nYou are a helpful assistant.\n"
SETTINGS = {"num_train_epochs": 4, "learning_rate": 0.004, "per_device_train_batch_size": 4, "seed": 1}


def test_model_learns_the_colors_of_images(model_folder, colors, tmp_path):
    folder, data = model_folder("qwen"), {"test_size": 30, "max_length": 300, "packing": "bfd"}
    run = train(str(colors), model=folder, output_dir=tmp_path / "run", settings=SETTINGS, **data)
    packs = load_build(run / "data")["train"]
    assert max(map(len, packs["seq_lengths"])) > 1
    held_out = compare(run, save_colors(tmp_path, 40, seed=1), n=None, max_new_tokens=8)
    assert len(held_out.rows) == 40
    assert (held_out.base.exact, held_out.base.perplexity > 50) == (0, True)
    assert held_out.tuned.exact >= 0.95
    assert held_out.tuned.perplexity < 1.1
    # The samples during training are answers to images, too.
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [sample["answer"] for sample in samples[-3:]] == [sample["expected"] for sample in samples[-3:]]
    base, tuned = (load_model(str(path)).eval() for path in (folder, run / "model"))
    # The vision tower is frozen, and the estimate says so.
    estimate = json.loads((run / "run.json").read_text())["estimate"]
    assert 0 < estimate["trainable"] < estimate["parameters"]
    trained = dict(tuned.named_parameters())
    frozen = {name: weight for name, weight in base.named_parameters() if "visual" in name}
    assert len(frozen) > 10
    assert all(torch.equal(trained[name], weight) for name, weight in frozen.items())
    # The saved model can be used with images.
    assert json.loads((run / "model" / "preprocessor_config.json").read_text())["max_pixels"] == 28 * 28 * 16


def test_adapter_is_added_to_the_language_model_only(model_folder, colors, tmp_path):
    folder = model_folder("qwen")
    settings = {"max_steps": 1}
    run = train(str(colors), model=folder, output_dir=tmp_path / "run", lora={"r": 4}, settings=settings, limit=8)
    tuned = PeftModel.from_pretrained(load_model(folder), str(run / "model"))
    names = [name for name, _ in tuned.named_parameters() if "lora" in name]
    assert names
    assert all("language_model" in name for name in names)


def test_losses_of_packed_and_unpacked_training_are_equal(model_folder, colors, tmp_path):
    losses = []
    for packing in ("bfd", None):
        settings = {"max_steps": 2, "per_device_train_batch_size": 1 if packing else 30, "learning_rate": 0.001}
        data = {"limit": 30, "max_length": 10_000, "packing": packing}
        folder = tmp_path / f"run-{packing}"
        train(str(colors), model=model_folder("qwen"), output_dir=folder, settings=settings, **data)
        losses.append(json.loads((folder / "run.json").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_model_that_mixes_packed_images_is_trained_with_padding(model_folder, colors, tmp_path, capfd):
    options = {"model": model_folder("gemma3"), "settings": {"max_steps": 1}, "limit": 6}
    with pytest.raises(InputRefused, match=r"model_leaks.*attend to each other"):
        train(str(colors), output_dir=tmp_path / "a", packing="bfd", max_length=700, **options)
    train(str(colors), output_dir=tmp_path / "b", **options)
    assert "rows are padded, not concatenated" in " ".join(capfd.readouterr().err.split())


def test_images_after_many_rows_of_text_are_probed(model_folder, colors, tmp_path, capfd):
    """The first rows, and the first documents of the packed sequence with the image, have no images."""
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}] * 1100
    (image_row,) = (json.loads(line) for line in colors.read_text().splitlines()[:1])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, image_row]))
    options = {"model": model_folder("gemma3"), "settings": {"max_steps": 1}, "image_folder": str(colors.parent)}
    train(str(tmp_path / "rows.jsonl"), output_dir=tmp_path / "a", **options)
    assert "rows are padded, not concatenated" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(InputRefused, match="model_leaks"):
        train(str(tmp_path / "rows.jsonl"), output_dir=tmp_path / "b", packing="bfd", max_length=2000, **options)


def test_changed_image_is_refused(model_folder, colors, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(colors.parent, data)
    write_build(data / "colors.jsonl", model_folder("qwen"), tmp_path / "build", limit=8)
    for change in (lambda path: Image.new("RGB", (64, 64)).save(path), Path.unlink):
        change(data / "3.png")
        with pytest.raises(InputRefused, match="image_changed"):
            train(str(tmp_path / "build"), model=model_folder("qwen"), output_dir=tmp_path / "run")


def test_other_settings_of_the_image_processor_are_refused(model_folder, colors, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder("qwen"), folder)
    write_build(colors, folder, tmp_path / "build", limit=8)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_pixels": 28 * 28 * 64}))
    with pytest.raises(InputRefused, match=r"image_processor_mismatch.*differs from the image processor of the build"):
        train(str(tmp_path / "build"), model=str(folder), output_dir=tmp_path / "run")


def test_images_that_the_model_rejects_are_reported(model_folder, colors, tmp_path):
    model = load_model(model_folder("qwen"))
    write_build(colors, model_folder("qwen"), tmp_path / "build", limit=4)
    collator = make_collator(model, model_folder("qwen"), tmp_path / "build", padding_free=True)
    # The image processor makes more features than the build has image tokens.
    arguments = {"size": {"shortest_edge": 28 * 28 * 40, "longest_edge": 28 * 28 * 64}}
    larger = replace(collator, preprocessor=replace(collator.preprocessor, arguments=arguments))
    with pytest.raises(InputRefused, match="image_features.*build the data with the tokenizer and the image processor"):
        mixes_packed_images(model, larger, read_rows(tmp_path / "build")[:2])


@pytest.mark.parametrize("number", [0, 5])
def test_damaged_image_is_named(number, model_folder, colors, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(colors.parent, data)
    content = bytearray((data / f"{number}.png").read_bytes())
    content[content.index(b"IDAT") + 6] ^= 0xFF
    (data / f"{number}.png").write_bytes(content)
    settings = {"num_train_epochs": 1}
    with pytest.raises(InputRefused, match=rf"image_damaged.*{number}\.png"):
        train(str(data / "colors.jsonl"), model=model_folder("qwen"), output_dir=tmp_path / "run", limit=8,
              settings=settings)  # fmt: skip


def test_model_that_reads_only_text_is_refused(tiny, model_folder, colors, tmp_path):
    shutil.copytree(model_folder("qwen"), tmp_path / "text")
    for path in Path(tiny("llama")).glob("*model*"):
        shutil.copyfile(path, tmp_path / "text" / path.name)
    shutil.copyfile(Path(tiny("llama")) / "config.json", tmp_path / "text" / "config.json")
    with pytest.raises(UsageError, match=r"no_vision_model.*reads only text"):
        train(str(colors), model=str(tmp_path / "text"), output_dir=tmp_path / "run", limit=8)


def test_cross_attention_is_refused(tmp_path):
    processor = save_processor("mllama", tmp_path / "model")
    tokenizer = processor.tokenizer
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "intermediate_layers_indices": [0, 1], "vision_output_dim": 96, "image_size": 224}
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=tokenizer.vocab_size)
    model = MllamaForConditionalGeneration(config)
    with pytest.raises(UsageError, match="cross-attention"):
        make_image_collator(model, tokenizer, tmp_path / "model", tmp_path, padding_free=True)


def test_text_only_rows_train_a_vision_model(model_folder, tmp_path):
    rows = [{"prompt": f"Say {n}", "completion": f"Number {n}."} for n in range(8)]
    splits = build_sft_dataset(rows, model_folder("gemma3"), template="chatml", output_dir=tmp_path / "build")
    assert "images" not in splits["train"].column_names
    settings = {"max_steps": 2}
    folder = train(
        str(tmp_path / "build"), model=model_folder("gemma3"), output_dir=tmp_path / "run", settings=settings
    )
    assert (folder / "model" / "config.json").exists()


@pytest.mark.parametrize("name", mostly_long(FAMILIES, "qwen", "gemma3", "llava"))
def test_architecture_is_probed_without_its_weights(name, model_folder):
    assert has_leaking_architecture(load_model_config(model_folder(name))) is False


@pytest.mark.parametrize("name", mostly_long(FAMILIES, "qwen", "gemma3"))
def test_every_family_is_trained_and_evaluated(name, model_folder, colors, tmp_path):
    data = {"limit": 8, "test_size": 4, "lora": {"r": 4}}
    run = train(str(colors), model=model_folder(name), output_dir=tmp_path / "run", settings={"max_steps": 2}, **data)
    assert json.loads((run / "run.json").read_text())["loss"]
    report = compare(run, n=None, max_new_tokens=3)
    # The perplexity of a batch with padding equals the perplexity that the trainer computes from each row.
    assert report.tuned.perplexity == pytest.approx(json.loads((run / "run.json").read_text())["perplexity"], rel=1e-3)
    # Answers in a batch equal answers to one image at a time.
    alone = compare(run, n=None, max_new_tokens=3, batch_size=1)
    assert [row.tuned for row in alone.rows] == [row.tuned for row in report.rows]


def test_images_after_the_last_answer_do_not_belong_to_the_prompt(model_folder, colors, tmp_path):
    images = [save_image(tmp_path / f"{side}.png", (side, side)) for side in (40, 90)]
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which color?"}]}]
    answer = {"role": "assistant", "content": "red"}
    row = {"messages": [*said, answer, *said, {**answer, "train": False}], "images": images}
    settings = {"max_steps": 1, "per_device_train_batch_size": 1}
    rows = [
        row,
        {"messages": [*said, {**answer, "content": "blue"}, *said, {**answer, "train": False}], "images": images},
    ]
    run = train(rows, model=model_folder("qwen"), output_dir=tmp_path / "run", settings=settings, test_size=1)
    for data in (None, [row]):
        report = compare(run, data, n=None, max_new_tokens=2)
        assert [row.prompt for row in report.rows] == [f"[image 40×40] {SYSTEM}user\nWhich color?\nassistant"]


def test_export_of_images_is_refused(model_folder, colors, tmp_path):
    write_build(colors, model_folder("qwen"), tmp_path / "built", limit=4)
    with pytest.raises(InputRefused, match="export_images"):
        export(tmp_path / "built", "axolotl", tmp_path / "exported")


def test_beams_of_images_are_refused(model_folder, colors, tmp_path):
    run = train(
        str(colors), model=model_folder("qwen"), output_dir=tmp_path / "run", settings={"max_steps": 1}, limit=4
    )
    with pytest.raises(UsageError, match="num_beams=2 is not supported for prompts with images"):
        compare(run, n=2, max_new_tokens=2, num_beams=2)
    assert len(generate(run, ["Hello?"], max_new_tokens=2, num_beams=2)) == 1


def test_images_of_evaluation_data_are_beside_the_data(model_folder, colors, tmp_path):
    """The folder of the build's images is not used for other data, and errors name the row, the field and the option."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(colors, other / "colors.jsonl")
    data = {"image_folder": str(colors.parent), "limit": 6, "test_size": 2}
    run = train(str(colors), model=model_folder("qwen"), output_dir=tmp_path / "run", settings={"max_steps": 1}, **data)
    with pytest.raises(InputRefused, match=r"colors.jsonl:1 images\[0\].*set image_folder") as caught:
        compare(run, str(other / "colors.jsonl"), n=1)
    assert caught.value.code == "image_missing"
    save_image(other / "0.png", (77, 33))
    for options, size in (({}, "77×33"), ({"image_folder": str(colors.parent)}, None)):
        (row,) = compare(run, str(other / "colors.jsonl"), n=1, max_new_tokens=2, **options).rows
        assert row.prompt.startswith("[image ")
        assert (f"[image {size}]" in row.prompt) == (size is not None)
    # A missing image of the build is an error of the image, not of the options.
    number = load_build(run / "data")["test"][0]["images"][0]["path"]
    moved = Path(number).rename(tmp_path / "moved.png")
    try:
        with pytest.raises(InputRefused, match="image_changed"):
            compare(run, n=2, max_new_tokens=2)
    finally:
        moved.rename(number)


def test_changed_image_is_reported_by_a_worker_of_the_loader(model_folder, colors, tmp_path):
    shutil.copytree(colors.parent, tmp_path / "data")
    write_build(tmp_path / "data" / "colors.jsonl", model_folder("qwen"), tmp_path / "built", limit=12)
    save_image(tmp_path / "data" / "7.png", (50, 50))
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 2, "dataloader_num_workers": 1}
    with pytest.raises(InputRefused, match="image_changed.*7.png has changed.*restore the file") as caught:
        train(tmp_path / "built", model=model_folder("qwen"), output_dir=tmp_path / "run", settings=settings)
    assert "Traceback" not in str(caught.value)


def test_merged_model_has_the_image_processor(model_folder, colors, tmp_path):
    data = {"limit": 4, "lora": {"r": 4}}
    run = train(str(colors), model=model_folder("qwen"), output_dir=tmp_path / "run", settings={"max_steps": 1}, **data)
    merge(run, tmp_path / "merged")
    assert (tmp_path / "merged" / "preprocessor_config.json").exists()
    train(
        str(colors), model=str(tmp_path / "merged"), output_dir=tmp_path / "again", settings={"max_steps": 1}, limit=4
    )
