"""Every kind of picture a camera, a converter or an accident leaves behind."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from vla_ray.data.images import MAX_PIXELS, decode_rgb
from vla_ray.errors import ImageError

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, fmt: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, fmt, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_png_pixels_are_exact() -> None:
    pixels = noise(31, 17, 3)
    decoded = decode_rgb(encode(pixels), "a.png")
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    np.testing.assert_array_equal(decoded, pixels)


def test_jpeg_pixels_are_pillows() -> None:
    data = encode(noise(31, 17, 3), "JPEG")
    np.testing.assert_array_equal(decode_rgb(data, "a.jpg"), np.asarray(Image.open(io.BytesIO(data))))


def test_the_extension_does_not_matter() -> None:
    assert decode_rgb(encode(noise(4, 4, 3), "JPEG"), "a.png").shape == (4, 4, 3)


def test_one_pixel() -> None:
    np.testing.assert_array_equal(decode_rgb(encode(np.array([[[1, 2, 3]]], dtype=np.uint8)), "a.png"), [[[1, 2, 3]]])


@pytest.mark.parametrize("fmt", ["PNG", "JPEG"])
def test_grey(fmt: str) -> None:
    decoded = decode_rgb(encode(np.full((8, 8), 93, dtype=np.uint8), fmt), "a")
    np.testing.assert_array_equal(decoded, np.full((8, 8, 3), 93))


def test_one_bit() -> None:
    bits = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(decode_rgb(encode(bits), "a.png"), np.where(bits, 255, 0)[..., None].repeat(3, 2))


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    decoded = decode_rgb(encode(grey), "a.png")
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 0, 1, 1, 128, 255])
    assert (decoded == decoded[..., :1]).all()


def test_sixteen_bit_colour() -> None:
    data = png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 5 * 257, 0))
    np.testing.assert_array_equal(decode_rgb(data, "a.png"), [[[255, 5, 0]]])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"transparency": 1}, {"transparency": bytes([0, 128, 255])}])
def test_palette(options: dict[str, Any]) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    for x in range(3):
        image.putpixel((x, 0), x)
    np.testing.assert_array_equal(decode_rgb(encode(image, **options), "a.png"), [[RED, GREEN, BLUE]])


@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_alpha_is_dropped_not_blended(alpha: int) -> None:
    np.testing.assert_array_equal(decode_rgb(encode(Image.new("RGBA", (1, 1), (9, 80, 7, alpha))), "a"), [[[9, 80, 7]]])
    np.testing.assert_array_equal(decode_rgb(encode(Image.new("LA", (1, 1), (55, alpha))), "a"), [[[55, 55, 55]]])


def test_cmyk() -> None:
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    np.testing.assert_array_equal(decode_rgb(data, "a.jpg")[0, 0], RED)


@pytest.mark.parametrize("fmt", ["PNG", "JPEG"])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation(fmt: str, value: int) -> None:
    upright = np.zeros((16, 32, 3), dtype=np.uint8)
    upright[:8, :8] = 255  # the upper left corner of the true scene is white
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[value]
    data = encode(np.ascontiguousarray(stored), fmt, exif=orientation(value))
    decoded = decode_rgb(data, "a")
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).max() < 16


def test_damaged_exif_does_not_cost_the_frame() -> None:
    data = encode(noise(8, 9, 3), "JPEG", exif=b"Exif\0\0 not a TIFF header")
    assert decode_rgb(data, "a.jpg").shape == (8, 9, 3)


def test_jpeg_with_a_second_picture() -> None:
    """Stereo and phone cameras append one; the first is the frame."""
    pixels = noise(16, 16, 3)
    data = encode(pixels, "MPO", save_all=True, append_images=[Image.new("RGB", (16, 16))])
    np.testing.assert_array_equal(decode_rgb(data, "a.jpg"), decode_rgb(encode(pixels, "JPEG"), "b.jpg"))


# What is refused


def refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        decode_rgb(data, "scene/frame_7.png")
    assert "scene/frame_7.png" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, I am text\nwith lines", "is not a PNG or JPEG image.*b'hello, I'"),
        (b"\x89PNG\r\n\x1a\n", "damaged or cut off header"),
        (b"\xff\xd8", "damaged or cut off header"),
        (encode(noise(4, 4, 3), "BMP"), "is not a PNG or JPEG"),
        (encode(noise(4, 4, 3), "GIF"), "is not a PNG or JPEG"),
        (encode(noise(4, 4, 3), "WEBP"), "is not a PNG or JPEG"),
    ],
)
def test_not_an_image(data: bytes, message: str) -> None:
    refused(data, message)


def test_a_flipped_byte_in_a_png() -> None:
    data = bytearray(encode(noise(40, 40, 3)))
    data[len(data) // 2] ^= 0xFF
    refused(bytes(data), "cannot be decoded")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (60_000, 60_000)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    assert width * height > MAX_PIXELS
    refused(png(width, height, 8, 2, b"\0" * 100), "100 megapixels")


@pytest.mark.parametrize(
    ("fmt", "options"),
    [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"restart_marker_rows": 1})],
)
def test_a_cut_file_is_refused_or_whole(fmt: str, options: dict[str, Any]) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = encode(noise(24, 40, 3), fmt, **options)
    whole = decode_rgb(data, "a")
    errors = 0
    for length in range(len(data)):
        try:
            np.testing.assert_array_equal(decode_rgb(data[:length], "a"), whole)
        except ImageError:
            errors += 1
    assert errors >= len(data) - 30  # a PNG may lose its empty last chunk


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"exif": orientation(3)}])
def test_a_cut_jpeg_filled_up_with_zeros_is_refused(options: dict[str, Any]) -> None:
    data = encode(noise(64, 64, 3), "JPEG", **options)
    half = len(data) // 2
    refused(data[:half] + bytes(len(data) - half), "is truncated")


def test_bytes_after_the_end_are_harmless() -> None:
    data = encode(noise(16, 16, 3), "JPEG")
    np.testing.assert_array_equal(decode_rgb(data + b"trailer" + bytes(99), "a.jpg"), decode_rgb(data, "a.jpg"))


def test_golden_frames(golden: Path) -> None:
    for path in sorted((golden / "simlingo_a" / "scene" / "frames").iterdir()):
        np.testing.assert_array_equal(decode_rgb(path.read_bytes(), path.name), np.asarray(Image.open(path)))
