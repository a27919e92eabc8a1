"""What a prepared dataset holds, in words: counts and filters, actions, problems."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vla_ray.data.cast.shards import COUNTS
from vla_ray.stages.dataset_document import totals

_SHOWN_PROBLEMS = 5
_HEADS = {"no_language": "no language", "not_finite": "not finite"}


def dataset_table(document: Mapping[str, Any]) -> list[str]:
    """Lines about a `dataset.json`."""
    return [*_counts(document), *_recordings(document), *_actions(document), *_problems(document)]


def _counts(document: Mapping[str, Any]) -> Iterator[str]:
    rows = [*document["counts"], {"dataset": "all", "split": "", **totals(dict(document))}]
    width = max(len("sub-dataset"), *(len(row["dataset"]) for row in rows))
    heads = {name: _HEADS.get(name, name) for name in COUNTS}
    widths = {name: max(len(head), *(len(f"{row[name]:,}") for row in rows)) for name, head in heads.items()}
    yield f"  {'sub-dataset':{width}s} {'split':5s} " + " ".join(f"{heads[name]:>{widths[name]}s}" for name in COUNTS)
    for row in rows:
        numbers = " ".join(f"{row[name]:{widths[name]},}" for name in COUNTS)
        yield f"  {row['dataset']:{width}s} {row['split']:5s} {numbers}"
    if document["options"]["split_by"] != "source":
        yield "  split again by recording:"
        for dataset, counts in document["samples"].items():
            parts = ", ".join(f"{count:,} {split}" for split, count in sorted(counts.items()))
            yield f"  {dataset:{width}s} {parts}"


def _recordings(document: Mapping[str, Any]) -> Iterator[str]:
    recordings = document["recordings"]
    parts = ", ".join(f"{count:,} {split}" for split, count in recordings["by_split"].items())
    yield f"  recordings: {parts}"
    if recordings["shared"]:
        yield (
            f"  warning: {recordings['shared']:,} recordings lie in more than one split (e.g. "
            f"{recordings['examples'][0]}): validation will look better than it is; split_by=recording keeps them apart"
        )


def _actions(document: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    if not any(s["count"] for s in document["statistics"].values()):
        yield "  actions: none, so there is nothing to learn or to measure; a policy can predict them"
        return
    yield f"  actions: {document['horizon']} steps in {document['units']}"
    for split, s in document["statistics"].items():
        if not s["count"]:
            continue
        quantiles = s["quantiles"]
        names = " ".join(f"{100 * float(q):6g}%" for q in quantiles)
        yield f"  {split:8s}   {'mean':>7s} {'std':>7s} {'min':>7s} {names} {'max':>7s} {'beyond 1':>9s}"
        for axis, name in enumerate("xy"):
            row = [s["mean"], s["std"], s["min"], *quantiles.values(), s["max"]]
            numbers = " ".join(f"{values[axis]:7.3f}" for values in row)
            yield f"  {'':8s} {name} {numbers} {s['clip_rate_1'][axis]:9.1%}"
        low, *_, high = quantiles
        beyond = ", ".join(f"{name} {s['clip_rate_quantiles'][axis]:.2%}" for axis, name in enumerate("xy"))
        bounds = f"{100 * float(low):g} and {100 * float(high):g} %"
        yield f"  {'':8s} median step {s['median_step']:.3f}; beyond the quantiles {bounds}: {beyond}"


def _problems(document: Mapping[str, Any]) -> Iterator[str]:
    problems = document["problems"]
    if problems:
        yield ""
    for problem in problems[:_SHOWN_PROBLEMS]:
        yield f"  problem: {problem}"
    if len(problems) > _SHOWN_PROBLEMS:
        yield f"  ... and {len(problems) - _SHOWN_PROBLEMS} more in dataset.json"
