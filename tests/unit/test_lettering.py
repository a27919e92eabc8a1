"""Text keeps to its width, and loses no more of itself than it must."""

from __future__ import annotations

import numpy as np
import pytest

from vla_ray.report.lettering import fit, font, plain, wrap

FACE = font(12)
SENTENCE = "Slow down behind the lead car because the light is red."
ODD = "".join(map(chr, np.random.default_rng(1).integers(1, 0x2FFFF, 300).tolist()))


def test_plain_is_one_line_of_what_can_be_drawn() -> None:
    assert plain(" a\n\tb\x00c\u2028 \ud800d ") == "a b c d"
    assert plain("caf\u00e9 \u4f60\u597d") == "caf\u00e9 \u4f60\u597d"
    assert len(plain("x" * 10**6)) < 10_000


def test_what_fits_stays() -> None:
    assert fit(SENTENCE, FACE, 1000) == SENTENCE
    assert wrap(SENTENCE, FACE, 1000, 3) == [SENTENCE]
    assert wrap("", FACE, 100, 3) == []


def test_what_does_not_fit_says_so() -> None:
    start, end = fit(SENTENCE, FACE, 120), fit(SENTENCE, FACE, 120, keep_end=True)
    assert start.endswith("\u2026")
    assert SENTENCE.startswith(start[:-1])
    assert end.startswith("\u2026")
    assert SENTENCE.endswith(end[1:])
    assert FACE.getlength(start) > 90  # as much as possible is kept
    assert fit(SENTENCE, FACE, 3) == ""


@pytest.mark.parametrize("text", [SENTENCE, "x" * 400, SENTENCE * 20, ODD, "\u4f60\u597d" * 99, "a " * 500])
@pytest.mark.parametrize("width", [-5, 0, 7, 30, 121, 400])
def test_lines_are_never_too_wide_or_too_many(text: str, width: float) -> None:
    for most in (1, 2, 5):
        lines = wrap(text, FACE, width, most)
        assert len(lines) <= most
        assert all(FACE.getlength(line) <= width for line in lines)
    assert FACE.getlength(fit(text, FACE, max(width, 0))) <= max(width, 0)


def test_wrapping_keeps_words_and_order() -> None:
    lines = wrap(SENTENCE, FACE, 130, 10)
    assert len(lines) > 1
    assert " ".join(lines) == SENTENCE
    assert wrap(SENTENCE, FACE, 130, 2)[1].endswith("\u2026")
    broken = wrap("x" * 60, FACE, 100, 50)
    assert "".join(broken) == "x" * 60
