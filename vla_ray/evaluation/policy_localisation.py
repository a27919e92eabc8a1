"""Does a policy's relevance lie on what its instruction names? Corridors know: every picture has masks of its parts.

A door that is large and colourful draws relevance whatever is asked, so lift over chance alone says little. Every map
is also scored on the part of the same kind on the other side, and every part with the map of the instruction that names
the other one: relevance that follows language is higher on the named part than both.

A target whose sign turns with the instruction (`side`, `lateral_offset`) turns what acts as well: its maps then move
without the policy looking elsewhere. Score |signed| maps beside them, or targets without a sign (`token_1`,
`forward_progress`), before saying that it listens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vla_ray.data.corridors import CorridorScene, scene
from vla_ray.data.corridors.world import SIDES
from vla_ray.errors import DataError
from vla_ray.evaluation.bootstrap import Estimate, mean_with_interval, paired_difference
from vla_ray.explain.faithfulness.localisation import Localisation, localise
from vla_ray.explain.heatmap import HeatMap

ALL = "all"


@dataclass(frozen=True, slots=True)
class Located:
    """One map of one instruction that names a part of its picture.

    Attributes:
        part: what it names, e.g. `left door`.
        named: scores on it. other: on the part of the same kind on the other side, where there is one.
    """

    sample_id: str
    recording: str
    part: str
    named: Localisation
    other: Localisation | None

    @property
    def kind(self) -> str:
        """door, opening or person."""
        return self.part.split()[-1]


@dataclass(frozen=True, slots=True)
class Localised:
    """Means over maps of one kind of part, with intervals over pictures; 1 is chance of every lift.

    Attributes:
        maps: that name such a part and where it can be seen.
        area: share of the picture that it covers.
        lift: relevance on the named part, over its area.
        pointing: how often the strongest cell is on it (tolerance of one cell). chance: how often any cell is.
        other_lift: the same maps on the part on the other side. preference: lift - other_lift, of these maps.
        swapped_lift: on the named part, by maps of the instruction that names the other one.
        shift: lift - swapped_lift: by how much relevance moves with the instruction. Zero is a map that ignores it.
        follows: how often that is positive; 0.5 is chance.
    """

    maps: int
    area: Estimate
    lift: Estimate
    pointing: Estimate
    chance: Estimate
    other_lift: Estimate
    preference: Estimate
    swapped_lift: Estimate
    shift: Estimate
    follows: Estimate


def locate(sample_id: str, recording: str, instruction: str, heat: HeatMap) -> Located | None:
    """Score one map; None if the instruction names no part (`stop`), or one that cannot be seen.

    Args:
        recording: `scene_000123`.
        instruction: one that this corridor supports, in any of its wordings.
        heat: of this picture; a signed one turned so that positive is what acts.

    Raises:
        DataError: the recording is no corridor, or nobody can be asked this there.
    """
    place = _scene(recording)
    part = _part(place, instruction)
    named = None if part is None else _score(place, part, heat)
    if part is None or named is None:
        return None
    opposite = _opposite(part)
    other = _score(place, opposite, heat) if opposite in place.parts else None
    return Located(sample_id, recording, part, named, other)


def policy_localisation(maps: Iterable[tuple[str, str, str, HeatMap]]) -> dict[str, Localised]:
    """Kind of part -> scores of all maps that name one; `all` for all of them. Empty if none does.

    Args:
        maps: (sample_id, recording, instruction, map) each, see `locate`.

    Raises:
        DataError: see `locate`.
    """
    found = [x for one in maps if (x := locate(*one)) is not None]
    kinds = {kind: [x for x in found if x.kind == kind] for kind in dict.fromkeys(x.kind for x in found)}
    return {kind: _summary(mine) for kind, mine in ({**kinds, ALL: found} if found else kinds).items()}


def table(found: Mapping[str, Mapping[str, Localised]]) -> str:
    """Lines of text: method -> kind -> scores, one line each."""
    columns = ("lift", "other_lift", "preference", "swapped_lift", "shift", "follows", "pointing", "chance", "area")
    rows = [["method", "part", "maps", *columns]]
    for method, kinds in found.items():
        rows += [[method, kind, str(x.maps), *(str(getattr(x, c)) for c in columns)] for kind, x in kinds.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _summary(found: Sequence[Located]) -> Localised:
    pictures = [x.recording for x in found]
    lift = [x.named.lift for x in found]
    other = [x.other.lift if x.other else None for x in found]
    # Several instructions may name the same part; the other one is then the mean of all that name it.
    by_part: dict[tuple[str, str], list[float]] = {}
    for x in found:
        if x.other is not None:
            by_part.setdefault((x.recording, _opposite(x.part)), []).append(x.other.lift)
    swapped = [sum(v) / len(v) if (v := by_part.get((x.recording, x.part))) else None for x in found]
    follows = [None if s is None else 0.5 if one == s else float(one > s) for one, s in zip(lift, swapped, strict=True)]
    return Localised(
        maps=len(found),
        area=mean_with_interval([x.named.area for x in found], pictures),
        lift=mean_with_interval(lift, pictures),
        pointing=mean_with_interval([x.named.pointing for x in found], pictures),
        chance=mean_with_interval([x.named.near_area for x in found], pictures),
        other_lift=mean_with_interval(other, pictures),
        preference=paired_difference(lift, other, pictures),
        swapped_lift=mean_with_interval(swapped, pictures),
        shift=paired_difference(lift, swapped, pictures),
        follows=mean_with_interval(follows, pictures),
    )


def _scene(recording: str) -> CorridorScene:
    kind, _, seed = recording.partition("_")
    if kind != "scene" or not seed.isdigit():
        raise DataError(
            f"the recording {recording!r} is no corridor: masks of what an instruction names exist only for the "
            "synthetic corridors (scene_000123). Explain a dataset that jobs/prepare_cast.py made of these."
        )
    return scene(int(seed))


def _part(place: CorridorScene, instruction: str) -> str | None:
    for task in place.tasks:
        if instruction in task.instructions:
            return task.object
    known = ", ".join(task.instructions[0] for task in place.tasks)
    raise DataError(f"{place.name} is never asked to {instruction!r}; it is asked: {known}.")


def _score(place: CorridorScene, part: str, heat: HeatMap) -> Localisation | None:
    geometry = heat.geometry
    if geometry.height != geometry.width:
        raise DataError(
            f"the map of {place.name} is of a picture of {geometry.height} x {geometry.width}, not a square."
        )
    return localise(heat.combined().values, place.mask(part, geometry.height), geometry)


def _opposite(part: str) -> str:
    """`right door` of `left door`; a part without a side stays what it is, and has no other."""
    side, _, kind = part.partition(" ")
    others = [name for name in SIDES if name != side]
    return f"{others[0]} {kind}" if side in SIDES else ""
