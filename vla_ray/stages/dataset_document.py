"""`dataset.json`: what a prepared dataset holds, added up from the records of its shards.

Its fingerprint is of samples, not of files: the same source prepared again, elsewhere or with another Parquet library,
has the same one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from vla_ray.data.cast.shards import COUNTS, ReadOptions, Tally
from vla_ray.data.cast.statistics import ActionStatistics
from vla_ray.data.prepared import FORMAT, VERSION
from vla_ray.schema import ACTION_UNITS
from vla_ray.stages.prepare import ShardRecord


def build_document(records: Sequence[ShardRecord], source: str, options: ReadOptions) -> dict[str, Any]:
    """All of dataset.json, JSON values only. The order of the records does not matter."""
    records = sorted(records, key=lambda record: record.shard.name)
    by_dataset: dict[tuple[str, str], ActionStatistics] = defaultdict(ActionStatistics)
    by_split: dict[str, ActionStatistics] = defaultdict(ActionStatistics)
    samples: dict[str, Counter[str]] = defaultdict(Counter)
    splits_of: dict[str, set[str]] = defaultdict(set)
    files = []
    for record in records:
        for file in record.files:
            statistics = ActionStatistics.from_dict(file.statistics)
            by_dataset[file.dataset, file.split].merge(statistics)
            by_split[file.split].merge(statistics)
            samples[file.dataset][file.split] += file.rows
            for recording in file.recordings:
                splits_of[recording].add(file.split)
            named = {name: getattr(file, name) for name in ("path", "dataset", "split", "bytes", "digest")}
            files.append({**named, "row_groups": list(file.row_groups)})
    what = {
        "horizon": options.horizon,
        "units": ACTION_UNITS,
        "options": options.to_dict(),
        "counts": _counts(records),
        "samples": {dataset: dict(counts) for dataset, counts in samples.items()},
        "recordings": _recordings(splits_of),
        "statistics": {s: {**v.summary(), "exact": v.to_dict()} for s, v in sorted(by_split.items())},
        "statistics_by_dataset": [
            {"dataset": dataset, "split": split, **statistics.summary()}
            for (dataset, split), statistics in sorted(by_dataset.items())
        ],
    }
    whole = {**what, "files": [{k: v for k, v in file.items() if k != "bytes"} for file in files]}
    fingerprint = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    problems = Tally.total(record.tally for record in records).problems
    head = {"format": FORMAT, "version": VERSION, "source": source, "fingerprint": fingerprint}
    return {**head, **what, "problems": problems, "files": files}


def totals(document: dict[str, Any]) -> dict[str, int]:
    """The counts of all sub-datasets together."""
    return {name: sum(row[name] for row in document["counts"]) for name in COUNTS}


def _counts(records: Sequence[ShardRecord]) -> list[dict[str, Any]]:
    """What became of the steps of each sub-dataset and split of the source."""
    rows: dict[tuple[str, str], Tally] = defaultdict(Tally)
    for record in records:
        rows[record.shard.dataset, record.shard.split] += record.tally
    return [
        {"dataset": dataset, "split": split, **{name: getattr(tally, name) for name in COUNTS}}
        for (dataset, split), tally in sorted(rows.items())
    ]


def _recordings(splits_of: dict[str, set[str]]) -> dict[str, Any]:
    """How many recordings each split has, and which lie in several: what leaks from training into validation."""
    shared = sorted(recording for recording, splits in splits_of.items() if len(splits) > 1)
    counts = Counter(split for splits in splits_of.values() for split in splits)
    return {"by_split": dict(sorted(counts.items())), "shared": len(shared), "examples": shared[:5]}
