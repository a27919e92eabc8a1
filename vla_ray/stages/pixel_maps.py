"""Maps of the methods that ask the model about pixels: gradients, hidden cells, propagation rules.

All of them explain the function with the text held fixed, one frame at a time; perturbations go through the model in
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_ray.data.tiles import TileGeometry
from vla_ray.errors import TargetError
from vla_ray.explain.gradients import gradient_x_input, integrated_gradients
from vla_ray.explain.heatmap import HeatMap, assemble
from vla_ray.explain.lrp import lrp
from vla_ray.explain.methods import Method
from vla_ray.explain.perturb import Probe, blurred, canvas_grid
from vla_ray.explain.question import Question
from vla_ray.explain.references import iss, occlusion
from vla_ray.models.simlingo.processing import normalise
from vla_ray.stages.maps import MadeMap

ASK_BATCH = 8  # pictures per forward on a CPU: larger batches are no faster there
GPU_ASK_BATCH = 32


@dataclass(frozen=True, slots=True)
class PixelOptions:
    """`ig_steps`: first number of steps of integrated gradients; `iss_samples`: most masks; `seed`: of the masks."""

    ig_steps: int = 32
    iss_samples: int = 1000
    seed: int = 0


def make_probe(question: Question, tiles: np.ndarray, geometry: TileGeometry) -> Probe:
    """The frame with its blurred picture as what hidden cells show."""
    device = question.model.device
    batch = GPU_ASK_BATCH if device.type == "cuda" else ASK_BATCH
    pixels, baseline = (normalise(x, device) for x in (tiles, blurred(tiles, geometry)))
    return Probe(question, pixels, baseline, geometry, batch)


def pixel_maps(
    methods: Sequence[Method],
    question: Question,
    tiles: np.ndarray,
    geometry: TileGeometry,
    options: PixelOptions,
) -> list[MadeMap]:
    """Maps of the methods among `methods` that need pixels.

    Args:
        tiles: [T, S, S, 3] uint8 of the frame.

    Raises:
        TargetError: a gradient or a map is not finite.
    """
    wanted = [m for m in methods if m.needs_pixels]
    if not wanted:
        return []
    probe = make_probe(question, tiles, geometry)
    made = []
    for method in wanted:
        heat, direction, columns = _MAKERS[method.name](probe, question, options)
        if not np.isfinite(heat.values).all():  # forwards without a gradient: nothing has looked at them yet
            raise TargetError(f"{method.name}: the map has values that are not finite.")
        error = columns.pop("standard_error", None)
        made.append(MadeMap(method, direction, heat, columns, error))
    return made


Made = tuple[HeatMap, str, dict[str, Any]]


def _grid(question: Question) -> int:
    return question.model.config.patch_grid


def _gradient_x_input(probe: Probe, question: Question, options: PixelOptions) -> Made:
    tiles = gradient_x_input(question, probe.pixels_T3SS, _grid(question))
    return assemble(tiles.cpu().numpy(), probe.geometry), "none", {"forwards": 3}


def _integrated_gradients(probe: Probe, question: Question, options: PixelOptions) -> Made:
    found = integrated_gradients(
        question,
        probe.pixels_T3SS,
        probe.baseline_T3SS,
        _grid(question),
        steps=options.ig_steps,
        max_steps=max(256, options.ig_steps),
        batch_size=ASK_BATCH,  # with a graph, of which a GPU holds fewer than of plain forwards
    )
    # A doubling starts anew: midpoints do not nest. A backward pass counts as two.
    passes = 2 + 3 * (2 * found.steps - options.ig_steps)
    columns = {"completeness_error": found.completeness_error, "forwards": passes}
    return assemble(found.values_TGG.cpu().numpy(), probe.geometry), "signed", columns


def _occlusion(probe: Probe, question: Question, options: PixelOptions) -> Made:
    grid = _grid(question)
    window = max(2, grid // 8)  # 4 patches (56 px) of a full-size tile, 2 of a small one
    shape = canvas_grid(probe.geometry, grid)
    found = occlusion(probe, question.target.head, shape, window, window // 2)
    # A token's logit has no trajectory: what matters to it is how far it falls.
    values = found.displacement if question.target.mode == "action" else np.clip(found.drop, 0, None)
    return HeatMap(values, probe.geometry), "none", {"forwards": found.forwards}


def _iss(probe: Probe, question: Question, options: PixelOptions) -> Made:
    found = iss(
        probe,
        question.target.head,
        canvas_grid(probe.geometry, _grid(question)),
        effect="trajectory" if question.target.mode == "action" else "scalar",
        min_samples=min(256, options.iss_samples),
        max_samples=options.iss_samples,
        seed=options.seed,
    )
    columns = {"standard_error": found.errors, "forwards": found.forwards}
    return HeatMap(found.scores, probe.geometry), "none", columns


def _lrp(probe: Probe, question: Question, options: PixelOptions) -> Made:
    tiles = lrp(question, probe.pixels_T3SS)
    return assemble(tiles.cpu().numpy(), probe.geometry), "signed", {"forwards": 3}


_MAKERS: dict[str, Callable[[Probe, Question, PixelOptions], Made]] = {
    "gradient_x_input": _gradient_x_input,
    "integrated_gradients": _integrated_gradients,
    "occlusion": _occlusion,
    "iss": _iss,
    "lrp": _lrp,
}
