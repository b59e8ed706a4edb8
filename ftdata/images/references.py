"""Read the size and the hash of an image without decoding its pixels, and check that its file is complete."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import stat
import warnings
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ftdata.errors import BadRow, FtdataError, InputRefused, MissingDependency, describe_exception
from ftdata.types import ImageReference

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
"""Maximum number of pixels of an image. The pixels of such an image take 300 MB when they are decoded."""

MAX_BYTES = 256 << 20
"""Maximum size of an image file in bytes (256 MiB)."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")
"""Formats of images that can be read."""

_ORIENTATION = 0x0112
"""The EXIF tag for the orientation. Its values from 5 to 8 exchange the width and the height."""

_EXIF_IN_PNG = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""A PNG file with EXIF data contains one of these texts. Pillow decodes the pixels of a PNG file to read EXIF data."""

_URL = re.compile(r"\w{2,}://")

_DATA_URI = re.compile(r"data:image/[\w.+-]+(?:;[\w=.+-]+)*?;base64,", re.IGNORECASE)


def find_url(value: Any) -> str | None:
    """Return the URL of an image that must be downloaded, or `None` if the row or a file contains the image."""
    value = _unwrap(value)
    is_remote = isinstance(value, str) and _URL.match(value) and value[:5].lower() != "file:"
    return value if is_remote else None


def read_image(value: Any, folder: Path, field: str, download: Callable[[str], bytes] | None = None) -> ImageReference:
    """Read an image of a row. Its header is parsed, and its pixels are not decoded.

    Args:
        value: the path or `file://` URL of a file, a data URI, the bytes of an image, a Pillow image, or an object
            with one of them in `bytes`, `path`, `url` or `image_url`, as in the OpenAI format and in columns of
            `datasets`.
        folder: the folder that relative paths are resolved against.
        field: the path of the value in the row.
        download: returns the content of a URL; `None` to reject images at URLs.

    Raises:
        BadRow: `image_value`, `image_missing`, `image_remote`, `image_format`, `image_truncated` or `image_too_large`.
        MissingDependency: `no_pillow`, if Pillow is not installed.
    """
    value = _unwrap(value)
    if type(value).__module__.partition(".")[0] == "PIL":
        return _read_bytes(_encode(value, field), "", field)
    if isinstance(value, bytes | bytearray | memoryview):
        return _read_bytes(bytes(value), "", field)
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str) or not value.strip():
        problem = f"is {value!r:.60}, expected a path, a URL, a data URI or the bytes of an image"
        raise BadRow("image_value", problem, field=field, hint="correct the value, or remove the row")
    if value[:5].lower() == "data:":
        return _read_bytes(_decode_data_uri(value, field), "", field)
    if find_url(value):
        return _read_bytes(_download(value, field, download), "", field)
    path = Path(unquote(urlsplit(value).path)) if value[:7].lower() == "file://" else folder / value
    try:
        # Opening a pipe would wait, and devices have no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a regular file")
        # Unbuffered reading takes half of the time.
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.readall() if size <= MAX_BYTES else b""
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        problem = f"the file {str(path)[:200]!r} cannot be read: {reason}"
        hint = "correct the path, set image_folder, or remove the row"
        raise BadRow("image_missing", problem, field=field, hint=hint) from None
    if size > MAX_BYTES:
        raise _too_large(f"has {size:,} bytes, expected at most {MAX_BYTES:,}", field)
    return _read_bytes(content, str(path.absolute()), field)


def load_image(image: ImageReference, folder: Path | str = "", least_side: int | None = None) -> Image:
    """Load an image of a row or of a build in RGB, rotated as its EXIF data specifies, as transformers loads files.

    Args:
        image: the image.
        folder: the folder that a relative path is resolved against.
        least_side: the width and the height that suffice; a JPEG file is then decoded in a smaller size, which is much
            faster. `None` for the whole size.

    Returns:
        An image of Pillow.

    Raises:
        InputRefused: `image_changed`, if the file is missing or has changed; `image_damaged`, if the image cannot be
            decoded.
    """
    from PIL import ImageOps
    from PIL.Image import open as open_image

    path, content = Path(folder, image.path), image.content
    hint = "restore the file, or build the data again"
    if content is None:
        try:
            with path.open("rb") as file:
                file.seek(image.start)
                content = file.read(image.size)
        except OSError as error:
            problem = f"the image {path} cannot be read: {describe_exception(error)}"
            raise InputRefused("image_changed", problem, hint=hint) from None
    if sha256(content).hexdigest() != image.hash:
        raise InputRefused("image_changed", f"the image {path} has changed since the build", hint=hint)
    try:
        picture = open_image(io.BytesIO(content))
        if least_side:
            picture.draft("RGB", (least_side, least_side))
        return ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # noqa: BLE001  (Pillow raises many types for damaged images)
        place = f"{path}, bytes {image.start:,} to {image.start + image.size:,}"
        problem = f"the image {place} cannot be decoded: {describe_exception(error)}"
        raise InputRefused("image_damaged", problem, hint="replace the image, and build the data again") from None


def _unwrap(value: Any) -> Any:
    """Return the bytes or the address of an image that is stored as an object."""
    while isinstance(value, Mapping):
        content = value.get("bytes")
        if isinstance(content, str) and content and not _DATA_URI.match(content):
            # JSON cannot contain bytes.
            return f"data:image/unknown;base64,{content}"
        value = next((value[key] for key in ("bytes", "path", "url", "image_url") if value.get(key)), None)
    return value


def _encode(image: Any, field: str) -> bytes:
    """Return a Pillow image as the bytes of a PNG file with the same pixels, after EXIF orientation is applied."""
    from PIL import ImageOps

    buffer = io.BytesIO()
    try:
        rotated = ImageOps.exif_transpose(image)
        # A PNG file cannot contain other modes, such as CMYK.
        is_possible = rotated.mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
        (rotated if is_possible else rotated.convert("RGB")).save(buffer, "PNG", compress_level=1)
    except Exception as error:  # noqa: BLE001  (Pillow raises many types for damaged images)
        problem = f"the image cannot be stored: {error}"
        raise BadRow("image_value", problem, field=field, hint="replace the image, or remove the row") from None
    return buffer.getvalue()


def _decode_data_uri(text: str, field: str) -> bytes:
    start = _DATA_URI.match(text)
    try:
        if start:
            return base64.b64decode(text[start.end() :], validate=True)
        reason = "it does not begin with data:image/...;base64,"
    except (binascii.Error, ValueError) as error:
        reason = f"its base64 is invalid: {error}"
    problem = f"the data URI {text[:60]!r} contains no image: {reason}"
    raise BadRow("image_value", problem, field=field, hint="correct the data URI, or remove the row") from None


def _download(url: str, field: str, download: Callable[[str], bytes] | None) -> bytes:
    if download is None:
        problem = f"the image {url[:200]!r} is remote, and only local files are read"
        hint = "set download_images=True, or download the images and write their paths into the data"
        raise BadRow("image_remote", problem, field=field, hint=hint)
    try:
        content = download(url)
    except FtdataError as error:
        problem = f"the image {url[:200]!r} cannot be downloaded: {error.message}"
        raise BadRow("image_missing", problem, field=field, hint="correct the URL, or remove the row") from None
    if len(content) > MAX_BYTES:
        raise _too_large(f"has more than {MAX_BYTES:,} bytes", field)
    return content


def _read_bytes(content: bytes, path: str, field: str) -> ImageReference:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        problem = "reading images needs Pillow, which is not installed"
        raise MissingDependency("no_pillow", problem, hint="pip install 'ftdata[images]'") from None
    try:
        with warnings.catch_warnings():
            # Pillow warns about sizes that are compared with `MAX_PIXELS` below.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = image.width, image.height
            # Cameras write a preview behind the image.
            image_format = "JPEG" if image.format == "MPO" else str(image.format)
            is_small = width * height <= MAX_PIXELS
            has_exif = image_format != "PNG" or any(text in content for text in _EXIF_IN_PNG)
            if is_small and has_exif and image.getexif().get(_ORIENTATION) in (5, 6, 7, 8):
                width, height = height, width
    except Image.DecompressionBombError:
        raise _too_large(f"has more than {MAX_PIXELS:,} pixels", field) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError, TypeError, OverflowError) as error:
        reason = "empty" if not content else "no image of a known format, or its header is damaged"
        known = ", ".join(FORMATS)
        problem = f"the content of {len(content):,} bytes is {reason}; expected one of {known}"
        hint = "convert the image to PNG or JPEG, or remove the row"
        raise BadRow("image_format", problem, field=field, hint=hint) from error
    if not is_small:
        raise _too_large(f"has {width:,} x {height:,} pixels, expected at most {MAX_PIXELS:,} in all", field)
    if not _is_complete(content, image_format):
        problem = f"the {image_format} image of {width} x {height} pixels is truncated: its end is missing"
        raise BadRow("image_truncated", problem, field=field, hint="replace the image, or remove the row")
    digest = sha256(content).hexdigest()
    return ImageReference(path, 0, len(content), digest, width, height, None if path else content)


def _too_large(problem: str, field: str) -> BadRow:
    return BadRow("image_too_large", f"the image {problem}", field=field, hint="resize the image, or remove the row")


def _is_complete(content: bytes, image_format: str) -> bool:
    """Return whether an image ends as its format requires. Bytes after the end are ignored, as decoders do."""
    if image_format == "PNG":
        return _find_png_end(content) <= len(content)
    if image_format == "JPEG":
        # In the data of a scan, a zero byte follows each FF byte that is no marker. Most files end with the marker.
        end, scan = b"\xff\xd9", _find_scan(content)
        return (content.endswith(end) and scan <= len(content) - len(end)) or content.find(end, scan) >= 0
    if image_format == "GIF":
        return _find_gif_end(content) <= len(content)
    # The header of a WebP file contains the size that follows, and a BMP file its whole size, which can be 0.
    size = 8 + _read_int(content, 4) if image_format == "WEBP" else _read_int(content, 2)
    return len(content) >= size


def _read_int(content: bytes, position: int) -> int:
    return int.from_bytes(content[position : position + 4], "little")


def _find_png_end(content: bytes) -> int:
    """Return the position after the last chunk of a PNG file. If it is behind the end of the file, data is missing."""
    position, kind = 8, b""
    while kind != b"IEND" and position <= len(content):
        length, kind = int.from_bytes(content[position : position + 4]), content[position + 4 : position + 8]
        # A chunk consists of its length, its type, its data and a checksum.
        position += 12 + length
    return position


def _find_gif_end(content: bytes) -> int:
    """Return the position after the first frame of a GIF file, or a position behind the end if data is missing."""
    position = 13 + _color_table_size(content[10:11])
    is_frame = False
    while not is_frame and position < len(content):
        is_frame = content[position] == ord(",")
        # An extension has a label of one byte. A frame has a descriptor, colors, and the size of its first code.
        position += 11 + _color_table_size(content[position + 9 : position + 10]) if is_frame else 2
        while position < len(content) and content[position]:
            position += 1 + content[position]
        position += 1
    return position if is_frame else len(content) + 1


def _color_table_size(flags: bytes) -> int:
    """Return the number of bytes of the color table that a byte of flags announces."""
    return 3 << (flags[0] & 7) + 1 if flags and flags[0] & 0x80 else 0


def _find_scan(content: bytes) -> int:
    """Return the position of the first scan of a JPEG file, or the size of the file if there is no scan."""
    position = 2
    while position < len(content) and content[position : position + 2] != b"\xff\xda":
        # The length of a segment follows its marker of two bytes. Markers can have additional FF bytes before them.
        is_padding = content[position + 1 : position + 2] == b"\xff"
        position += 1 if is_padding else 2 + int.from_bytes(content[position + 2 : position + 4])
    return min(position, len(content))
