"""The size of an image is read from its header, and damaged images are rejected with their place."""

import base64
import hashlib
import io
import struct
import zlib

import pytest
from PIL import Image, ImageOps

from ftdata.errors import BadRow
from ftdata.images import references
from ftdata.images.references import FORMATS, ImageReference, read_image

FIELD = "messages[0].content[1]"


def image_bytes(image_format="PNG", size=(37, 23), **options):
    file = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(file, image_format, **options)
    return file.getvalue()


def rejected(value, folder, code):
    with pytest.raises(BadRow) as caught:
        read_image(value, folder, FIELD)
    assert (caught.value.code, caught.value.field) == (code, FIELD)
    assert caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("image_format", FORMATS)
def test_size_and_hash_of_every_format(image_format, tmp_path):
    content = image_bytes(image_format)
    (tmp_path / "a b.img").write_bytes(content)
    expected = ImageReference("", 0, len(content), hashlib.sha256(content).hexdigest(), 37, 23, content)
    uri = f"data:image/{image_format.lower()};base64,{base64.b64encode(content).decode()}"
    for value in (
        content,
        memoryview(content),
        uri,
        {"bytes": content, "path": None},
        {"url": uri},
        {"image_url": {"url": uri}},
    ):
        assert read_image(value, tmp_path, FIELD) == expected
    in_file = expected._replace(path=str(tmp_path / "a b.img"), content=None)
    for value in (
        "a b.img",
        str(tmp_path / "a b.img"),
        (tmp_path / "a b.img").as_uri(),
        {"path": "a b.img", "bytes": None},
    ):
        assert read_image(value, tmp_path, FIELD) == in_file


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_image_has_the_size_that_models_see(image_format, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = image_bytes(image_format, exif=exif)
    read = read_image(content, tmp_path, FIELD)
    assert (read.width, read.height) == ImageOps.exif_transpose(Image.open(io.BytesIO(content))).size


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}])
def test_truncated_image_is_rejected(image_format, options, tmp_path):
    content = image_bytes(image_format, **(options if image_format == "JPEG" else {}))
    assert read_image(content + b"\0\0", tmp_path, FIELD).width == 37
    for size in {*range(0, len(content) - 2, max(1, len(content) // 60)), len(content) - 2}:
        with pytest.raises(BadRow) as caught:
            read_image(content[:size], tmp_path, FIELD)
        assert caught.value.code in {"image_format", "image_truncated"}, size


def test_truncated_image_with_a_thumbnail_is_rejected(tmp_path):
    thumbnail = image_bytes("JPEG", (8, 8))
    segment = b"\xff\xe2" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    content = image_bytes("JPEG")
    whole = content[:2] + segment + content[2:]
    assert read_image(whole, tmp_path, FIELD).width == 37
    assert "truncated" in rejected(whole[:-50], tmp_path, "image_truncated")


def test_huge_image_is_rejected_without_decoding(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    rejected(bomb, tmp_path, "image_too_large")
    header = struct.pack(">IIBBBBB", 10_001, 10_000, 8, 0, 0, 0, 0)
    large = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    assert "10,001 x 10,000 pixels" in rejected(large, tmp_path, "image_too_large")


def test_large_file_is_rejected_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "MAX_BYTES", 100)
    (tmp_path / "a.png").write_bytes(image_bytes())
    assert "expected at most 100" in rejected("a.png", tmp_path, "image_too_large")


@pytest.mark.parametrize(
    ("value", "code", "words"),
    [
        (None, "image_value", "is None"),
        (7, "image_value", "is 7"),
        (" ", "image_value", "is ' '"),
        ({}, "image_value", "is None"),
        ({"bytes": None, "path": None}, "image_value", "is None"),
        ([b"x"], "image_value", "is ["),
        ("missing.png", "image_missing", "No such file"),
        ("folder", "image_missing", "not a regular file"),
        ("a\0b.png", "image_missing", "null"),
        ("a.png" * 100, "image_missing", "too long"),
        ("https://example.com/a.png", "image_remote", "remote"),
        ("hf://datasets/x/a.png", "image_remote", "remote"),
        ("data:image/png;base64,%%%", "image_value", "base64 is invalid"),
        ("data:text/plain,hello", "image_value", "does not begin"),
        ("data:image/png;base64,", "image_format", "empty"),
        (b"", "image_format", "empty"),
        (b"<svg></svg>", "image_format", "BMP, GIF, JPEG, PNG, WEBP"),
        (b"\x89PNG\r\n\x1a\n", "image_format", "header is damaged"),
        ("text.png", "image_format", "header is damaged"),
        (image_bytes("TIFF"), "image_format", "expected one of"),
    ],
)
def test_value_without_an_image_is_rejected(value, code, words, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("not an image")
    assert words in rejected(value, tmp_path, code)


def test_preview_behind_a_photo_is_ignored(tmp_path):
    picture, preview = Image.new("RGB", (100, 60)), Image.new("RGB", (20, 10))
    picture.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[preview])
    found = read_image(tmp_path / "a.jpg", tmp_path, FIELD)
    assert (found.width, found.height) == (100, 60)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_image_of_pillow_is_stored_in_every_mode(mode, tmp_path):
    found = read_image(Image.new(mode, (30, 20)), tmp_path, FIELD)
    assert Image.open(io.BytesIO(found.content)).size == (found.width, found.height) == (30, 20)


def test_image_of_pillow_is_rotated_like_its_file(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (30, 20))
    picture.putpixel((0, 0), (255, 0, 0))
    picture.save(tmp_path / "a.png", exif=exif)
    opened, from_file = (read_image(one, tmp_path, FIELD) for one in (Image.open(tmp_path / "a.png"), "a.png"))
    assert (opened.width, opened.height) == (from_file.width, from_file.height) == (20, 30)
    assert Image.open(io.BytesIO(opened.content)).convert("RGB").getpixel((19, 0)) == (255, 0, 0)
