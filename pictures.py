"""Pictures out of their stored bytes, and the reasons why a pair cannot be used."""

import contextlib
import errno
import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from common import LFS, InputError, brief

# Errors of storage that is away or broken, not of a picture: then the run stops, and pairs are not replaced.
STORAGE_FAULTS = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH}
# PIL refuses a picture beside a text (a workflow, say) of more than 1 MB. We allow 64 MB.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY


class Unreadable(Exception):
    """Why a pair cannot be used, in a few words that are the same for the same fault."""


def stored_bytes(cell):
    """The encoded bytes in a cell: bytes, a path, or the {"bytes", "path"} of a `datasets.Image`."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        cell = Path(cell).read_bytes()
    if not cell:
        raise Unreadable("no image")
    if cell.startswith(LFS):
        raise Unreadable("a pointer of git-lfs")
    return cell


def read_image(content):
    """An upright RGB picture out of encoded bytes. Transparency becomes white. A colour profile is not applied.

    raises  whatever PIL raises on bytes that it cannot decode; ValueError above PIL's limit of pixels (a decompression
            bomb) and where the scale of the numbers is unknown
    """
    image = Image.open(io.BytesIO(content))
    kind = image.format
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError("a decompression bomb?")
    image.load()
    with contextlib.suppress(Exception):  # with damaged EXIF the picture is whole, and probably upright
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # PIL would clip values above 255, and show values in [0, 1] as black
        grey = Image.fromarray(to_8_bits(np.asarray(image), image.mode, kind))
        if "transparency" in image.info:
            is_seen = np.asarray(image) != image.info["transparency"]
            grey.putalpha(Image.fromarray(np.where(is_seen, 255, 0).astype(np.uint8)))
        image = grey
    if image.mode in ("La", "RGBa"):  # colours premultiplied by their transparency
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def to_8_bits(values, mode, kind):
    """Grey values [H, W] with 16 or 32 bits or floating point -> uint8. ValueError if their scale is unknown.

    mode, kind  PIL's mode and format. Images of 16 bits, and PGM files, always have the range 65535. Otherwise the
                largest value tells the range: 1 (floating point), 255 or 65535, with 5% for resampling's overshoot
    """
    top = 65535
    if not (mode.startswith("I;16") or kind == "PPM"):
        tops = [1, 255, 65535] if mode == "F" else [255, 65535]
        top = next((top for top in tops if values.max() <= 1.05 * top), None)
        if top is None or values.min() < -0.05 * top or mode == "F" and 1.05 < values.max() < 16:
            raise ValueError("pixel values of unknown scale")
    return (values.clip(0, top) * (255 / top)).round().astype(np.uint8)


def reason_of(error):
    """Why an image cannot be read, without the numbers and addresses that differ from one image to the next.

    raises  MemoryError, and InputError for STORAGE_FAULTS: they say nothing about the picture
    """
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, OSError) and error.errno in STORAGE_FAULTS:
        raise InputError(f"the data cannot be read ({brief(error)}). Once its storage is back, the same command resumes")
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, Image.DecompressionBombError):
        return "a decompression bomb?"
    text = getattr(error, "strerror", None) or brief(error)
    text = re.sub(r"\([^)]*\)|<[^>]*>", "", text)
    text = re.sub(r"\W*\d+", "", text)
    return " ".join(text.split()) or type(error).__name__
