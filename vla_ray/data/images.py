"""One camera frame from bytes to RGB, or one line that says why not.

A truncated file is an error, never a partly grey picture (Pillow's LOAD_TRUNCATED_IMAGES stays off), and anything that
is not a sound PNG or JPEG is an `ImageError`. Colour profiles and gamma are not applied.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vla_ray.errors import ImageError

FORMATS = ("PNG", "JPEG")
MAX_PIXELS = 100_000_000  # 300 MB decoded; a header that claims more is a mistake or an attack

_JPEG_MAGIC = b"\xff\xd8"
_MAGIC = (b"\x89PNG\r\n\x1a\n", _JPEG_MAGIC)


def decode_rgb(data: bytes, name: str) -> NDArray[np.uint8]:
    """Pixels [H, W, 3] of a PNG or JPEG file, whatever its name's extension says.

    EXIF orientation is applied (a photograph stands upright). Grey, 1-bit, palette and CMYK images are converted to
    RGB, 16-bit grey is scaled (65535 -> 255), and an alpha channel is dropped: the colour under it counts, nothing
    is blended over black or white.

    Args:
        data: the file's content.
        name: what to call the file in an error.

    Raises:
        ImageError: empty, not PNG or JPEG, truncated, corrupt, or more than MAX_PIXELS.
    """
    if not data:
        raise ImageError(f"{name} is empty (0 bytes); restore the image or remove it")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(
                    f"{name} claims {width} x {height} pixels; at most {MAX_PIXELS // 10**6} megapixels are allowed"
                )
            if data.startswith(_JPEG_MAGIC) and not _has_end(data):
                raise ImageError(f"{name} is truncated: a JPEG without its end marker; restore the image or remove it")
            image.load()
            return _to_rgb(_upright(image))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        if data.startswith(_MAGIC):
            raise ImageError(f"{name} has a damaged or cut off header; restore the image or remove it") from None
        raise ImageError(
            f"{name} is not a PNG or JPEG image (it starts with {data[:8]!r}); convert it or remove it"
        ) from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name} claims far more than {MAX_PIXELS // 10**6} megapixels, which is the limit") from None
    except Exception as error:  # Pillow answers damaged data with a dozen unrelated types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"{name} cannot be decoded: {reason}; restore the image or remove it") from error


def _has_end(jpeg: bytes) -> bool:
    """Whether an end-of-image marker follows the first scan's start.

    Otherwise a file cut short and filled up with zeros (an interrupted download, a power cut) decodes without
    complaint, with grey or noise below the cut. Compressed data never contains the marker; thumbnails, which do,
    come before the scan.
    """
    at = 2
    while jpeg[at : at + 1] == b"\xff" and at + 4 <= len(jpeg):
        marker = jpeg[at + 1]
        if marker == 0xDA:
            return jpeg.find(b"\xff\xd9", at) >= 0
        at += 1 if marker == 0xFF else 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return False


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata beside sound pixels: there is no orientation to apply
        return image


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.uint32)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    image.info.pop("transparency", None)  # only a warning would come of it: alpha is dropped anyway
    return np.array(image.convert("RGB"))
