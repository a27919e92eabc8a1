"""Actions as tokens: what is normalised, cut into bins and turned back, and how much of it is lost on the way.

Actions are deltas [..., H, 2] in waypoint spacings, x forward and y left. Bins are half-open and uniform between two
bounds in normalised space; their order is x0 y0 x1 y1 ..., decoding gives their centres. Numpy alone, for data workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vla_ray.errors import CheckpointError, ConfigError

MAX_BINS = 1024  # <loc0000> ... <loc1023>
KINDS = ("quantile", "mean_std", "none")
# One token after the other, each given those before it, or all at once at placeholders (OpenVLA-OFT, arXiv 2502.19645).
AUTOREGRESSIVE, PARALLEL = "autoregressive", "parallel"
DECODINGS = (AUTOREGRESSIVE, PARALLEL)
UNITS = "waypoint_spacings"
PROMPT_TEMPLATE = "<image>*N<bos>{instruction}\n"
VERSION = 1
_FLAT = 1e-6  # units; what varies less is constant

Pair = NDArray[np.float64]


def _pair(values: ArrayLike) -> tuple[float, float]:
    x, y = np.asarray(values, np.float64).tolist()
    return x, y


class Statistics(Protocol):
    """What a normaliser needs to know of the training actions; data/cast/statistics.py has it."""

    @property
    def mean(self) -> Pair: ...
    @property
    def std(self) -> Pair: ...
    def quantile(self, q: float) -> Pair: ...
    def clip_rate(self, low: ArrayLike, high: ArrayLike) -> Pair: ...


@dataclass(frozen=True, slots=True)
class ActionNormalizer:
    """(action - center) / scale per dimension; center and scale [2] in units, scale never 0."""

    kind: str = "none"
    center: tuple[float, float] = (0.0, 0.0)
    scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("center", "scale"):  # floats: 1 and 1.0 would have different fingerprints
            object.__setattr__(self, name, _pair(getattr(self, name)))

    @staticmethod
    def from_statistics(
        stats: Statistics, kind: str = "quantile", low: float = 0.005, high: float = 0.995, margin: float = 0.05
    ) -> ActionNormalizer:
        """Of training actions.

        `quantile` puts the quantiles `low` and `high` at -1 and 1, less `margin` of the range (OpenVLA and openpi do
        so with 1 % and 99 %); `mean_std` is the z-score; `none` leaves units. A constant dimension is only shifted.

        Raises:
            ConfigError: an unknown kind.
        """
        if kind == "none":
            return ActionNormalizer()
        if kind == "mean_std":
            center, scale = np.asarray(stats.mean, float), np.asarray(stats.std, float)
        elif kind == "quantile":
            bottom, top = np.asarray(stats.quantile(low), float), np.asarray(stats.quantile(high), float)
            center, scale = (bottom + top) / 2, (top - bottom) / 2 * (1 + margin)
        else:
            raise ConfigError(f"action.normalizer={kind!r} is unknown; known: {', '.join(KINDS)}.")
        scale = np.where(scale > _FLAT, scale, 1.0)
        return ActionNormalizer(kind, _pair(center), _pair(scale))

    def normalise(self, actions: ArrayLike) -> NDArray[np.float64]:
        return (np.asarray(actions, np.float64) - self.center) / self.scale

    def denormalise(self, normalised: ArrayLike) -> NDArray[np.float64]:
        return np.asarray(normalised, np.float64) * self.scale + self.center


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """What is lost when actions become tokens.

    Attributes:
        rmse: units, over all entries, clipped ones included.
        max_error: units, per dimension, of entries inside the bounds.
        clip_rate: share of entries outside the bounds, per dimension.
    """

    rmse: float
    max_error: tuple[float, float]
    clip_rate: tuple[float, float]


@dataclass(frozen=True, slots=True)
class ActionTokenizer:
    """Deltas [..., H, 2] in units <-> bins [..., 2H].

    Attributes:
        num_bins: per coordinate.
        num_steps: H.
        normalizer: applied first.
        bounds: of normalised actions, both dimensions; None: (-1, 1), for mean_std (-3, 3).
    """

    num_bins: int = 256
    num_steps: int = 8
    normalizer: ActionNormalizer = ActionNormalizer()
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.num_bins <= MAX_BINS:
            raise ConfigError(
                f"action.vocab_size={self.num_bins} does not fit: actions are written with the {MAX_BINS} tokens "
                f"<loc0000> ... <loc1023>. Set action.vocab_size between 2 and {MAX_BINS}."
            )
        default = (-3.0, 3.0) if self.normalizer.kind == "mean_std" else (-1.0, 1.0)
        low, high = _pair(self.bounds or default)
        object.__setattr__(self, "bounds", (low, high))
        if not low < high:
            raise ConfigError(f"action.action_bounds=[{low:g},{high:g}]: the first must be smaller than the second.")

    @property
    def num_tokens(self) -> int:
        """2H."""
        return 2 * self.num_steps

    def encode(self, actions: ArrayLike) -> NDArray[np.int64]:
        """Bins [..., 2H] of deltas [..., H, 2]; what lies outside the bounds falls into the outermost bins."""
        low, high = self._bounds
        normalised = self.normalizer.normalise(actions)
        if normalised.shape[-2:] != (self.num_steps, 2):
            raise ValueError(f"actions {normalised.shape} are not [..., {self.num_steps}, 2]")
        bins = np.floor((normalised - low) / (high - low) * self.num_bins)
        return np.clip(bins, 0, self.num_bins - 1).astype(np.int64).reshape(*normalised.shape[:-2], self.num_tokens)

    def decode(self, bins: ArrayLike) -> NDArray[np.float32]:
        """Deltas [..., H, 2] at the centres of bins [..., 2H]; a fraction (an expected bin) lies between centres."""
        numbers = np.asarray(bins, np.float64)
        pairs = numbers.reshape(*numbers.shape[:-1], self.num_steps, 2)
        return self._centers(pairs).astype(np.float32)

    def centers(self) -> Pair:
        """[2, num_bins] in units."""
        return self._centers(np.arange(self.num_bins)[:, None]).T

    def limits(self) -> tuple[Pair, Pair]:
        """Lowest and highest delta inside the bounds, each [2] in units."""
        low, high = self._bounds
        return self.normalizer.denormalise([low, low]), self.normalizer.denormalise([high, high])

    def clip_rate(self, actions: ArrayLike | Statistics) -> Pair:
        """Share of deltas outside the bounds, per dimension [2], of actions [..., 2] or of their statistics."""
        low, high = self.limits()
        if hasattr(actions, "clip_rate"):
            return np.asarray(actions.clip_rate(low, high), np.float64)
        xy = np.asarray(actions, np.float64).reshape(-1, 2)
        return ((xy < low) | (xy > high)).mean(axis=0)

    def round_trip(self, actions: ArrayLike) -> RoundTrip:
        """Encode, decode and compare actions [..., H, 2]."""
        given = np.asarray(actions, np.float64)
        errors = np.abs(self.decode(self.encode(given)) - given).reshape(-1, 2)
        low, high = self.limits()
        xy = given.reshape(-1, 2)
        inside = np.where((xy >= low) & (xy <= high), errors, 0.0)
        return RoundTrip(float(np.sqrt(np.square(errors).mean())), _pair(inside.max(axis=0)), _pair(self.clip_rate(xy)))

    @property
    def fingerprint(self) -> str:
        """Of all that gives a token its meaning, the prompt it follows included. Equal ones are interchangeable."""
        meaning = {**self.to_dict(), "units": UNITS, "prompt_template": PROMPT_TEMPLATE, "version": VERSION}
        return hashlib.blake2b(json.dumps(meaning, sort_keys=True).encode(), digest_size=16).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Primitives."""
        n = self.normalizer
        return {
            "action_tokenizer": {
                "num_bins": self.num_bins,
                "num_steps": self.num_steps,
                "bounds": list(self._bounds),
                "order": "x0 y0 x1 y1",
            },
            "action_normalizer": {"kind": n.kind, "center": list(n.center), "scale": list(n.scale)},
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> ActionTokenizer:
        """What to_dict gave. CheckpointError if it was not."""
        try:
            t, n = values["action_tokenizer"], values["action_normalizer"]
            normalizer = ActionNormalizer(str(n["kind"]), _pair(n["center"]), _pair(n["scale"]))
            return ActionTokenizer(int(t["num_bins"]), int(t["num_steps"]), normalizer, _pair(t["bounds"]))
        except (KeyError, TypeError, ValueError, ConfigError) as e:
            raise CheckpointError(f"the action tokenizer is damaged ({type(e).__name__}: {e}).") from e

    @property
    def _bounds(self) -> tuple[float, float]:
        assert self.bounds is not None
        return self.bounds

    def _centers(self, bins: NDArray[Any]) -> NDArray[np.float64]:
        low, high = self._bounds
        return self.normalizer.denormalise((bins + 0.5) / self.num_bins * (high - low) + low)
