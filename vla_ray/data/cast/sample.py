"""One training sample: a picture, what to do, and the actions of the next steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Sample:
    """What every source yields.

    Actions are deltas between consecutive positions in the robot frame of step `t`, x forward and y left, in units of
    waypoint spacings: 1.0 is one average step of that robot, metres are `actions * scale_m`.

    Attributes:
        sample_id: `<dataset>/<split>/<shard>:<record>/<t>`, stable across runs; episode ids may be missing or repeated.
        recording: what must not lie in two splits; chunks of one recording share it.
        t: step in its episode.
        image: PNG or JPEG bytes.
        instruction: the first variant.
        instructions: all distinct variants, at least one.
        actions: float32 [H, 2]; [0, 2] where nobody knows the right ones (logs of a robot).
        valid: bool, one per action; False where the episode had ended and its last position was repeated.
        scale_m: metres per unit; None if unknown.
    """

    sample_id: str
    dataset: str
    split: str
    recording: str
    t: int
    image: bytes
    instruction: str
    instructions: tuple[str, ...]
    actions: NDArray[np.float32]
    valid: NDArray[np.bool_]
    scale_m: float | None
