"""A payload, a table, a run directory or a dataset in words: what it holds, in which shapes, how it ended."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from vla_ray.data.prepared import DOCUMENT, PreparedDataset
from vla_ray.errors import StorageError
from vla_ray.report.show_dataset import describe_dataset, describe_samples, is_unprepared
from vla_ray.report.show_predictions import describe_predictions, holds_predictions, next_steps, trained_step
from vla_ray.schema import FAILED, PREDICTIONS, SAMPLES
from vla_ray.stages.predictions import PARQUET
from vla_ray.storage import payload as payload_file
from vla_ray.storage.files import Location, read_json
from vla_ray.storage.ledger import read_metrics
from vla_ray.storage.location import storage_errors

EXAMPLES = 5


def describe(path: str) -> str:
    """Text about whatever is at `path`. Of a dataset or a table of samples a contact sheet is written, too.

    Raises:
        StorageError: there is nothing, or nothing that this package wrote.
        DataError: a dataset that is not finished, or data that none is made of yet.
    """
    loc = Location.of(path)
    if loc.name.endswith(".pt"):
        return "\n".join(_payload(payload_file.load(loc), str(loc)))
    if loc.name.endswith(".parquet"):
        with storage_errors("read", loc), loc.open_input() as source:
            if set(SAMPLES.names) <= set(pq.read_schema(source).names):
                return "\n".join(describe_samples(loc))
            return "\n".join(_rows(pq.read_table(source), str(loc), loc))
    run = read_json(loc / "run.json")
    if (loc / DOCUMENT).exists() or (run is not None and run["settings"].get("job") == "prepare_cast"):
        return "\n".join(describe_dataset(loc))
    if run is not None:
        return "\n".join(_run(loc, run))
    if not loc.exists():
        raise StorageError(
            f"there is nothing at {loc}. Give a payload (.pt), a table (.parquet), a run directory or a dataset."
        )
    runs = [e.name for e in loc.list() if e.is_dir and (loc / e.name / "run.json").exists()]
    if runs:
        return f"{loc} holds {len(runs)} runs: {', '.join(runs)}\nlook at one: {_command(loc / runs[-1])}"
    if is_unprepared(loc):
        PreparedDataset.open(loc)  # says what to do
    raise StorageError(f"{loc} is no run directory (it has no run.json) and holds none. `make demo` writes one.")


def _command(loc: Location) -> str:
    """For a shell, whatever the path."""
    return shlex.join(["python", "jobs/show.py", f"path={loc}"])


def _run(loc: Location, run: dict[str, Any]) -> Iterator[str]:
    settings = run["settings"]
    yield f"run {loc.name}: {run['status']} ({settings.get('job')}, updated {run['updated']})"
    yield f"  directory  {loc}"
    yield f"  command    {run['command']}"
    yield "  versions   " + ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    yield from (f"  {key:22s} {value}" for key, value in settings.items())
    yield ""
    if settings.get("job") == "infer":
        yield from _rows(read_metrics(loc, schema=PREDICTIONS), "metrics", loc)
        return
    table = read_metrics(loc)
    yield from _table(table, "metrics")
    first = next((p for p in table["payload_path"].to_pylist() if p), None)
    if first:
        total = pc.sum(table["payload_bytes"]).as_py() or 0
        yield f"\npayloads: {total / 1e6:,.1f} MB; look at one: {_command(loc / first)}"


def _rows(table: pa.Table, name: str, loc: Location) -> Iterator[str]:
    """A run's rows, or another table; `loc` is the run or the table."""
    if not holds_predictions(table.column_names):
        yield from _table(table, name)
        return
    file = loc if loc.name.endswith(".parquet") else loc / PARQUET
    yield from describe_predictions(table, name, trained_step(file))
    yield from _failures(table)
    yield from next_steps(loc)


def _table(table: pa.Table, name: str) -> Iterator[str]:
    names = set(table.column_names)
    if not {"status", "target", "frame_id"} <= names:
        yield f"{name}: {table.num_rows:,} rows, columns: " + ", ".join(f"{f.name} ({f.type})" for f in table.schema)
        return
    counts = Counter(table["status"].to_pylist())
    yield f"{name}: {table.num_rows:,} rows, " + ", ".join(f"{n:,} {status}" for status, n in sorted(counts.items()))
    yield f"  {'target':24s} {'rows':>7s} {'failed':>7s} {'degenerate':>10s} {'min':>11s} {'median':>11s} {'max':>11s}"
    for target in sorted(set(table["target"].to_pylist())):
        rows = table.filter(pc.equal(table["target"], target))
        status = Counter(rows["status"].to_pylist())
        values = pc.drop_null(rows["target_scalar"])
        if len(values):
            low, high = pc.min_max(values).as_py().values()
            middle = pc.quantile(values, 0.5)[0].as_py()
            numbers = f"{low:11.4g} {middle:11.4g} {high:11.4g}"
        else:
            numbers = f"{'-':>11s} {'-':>11s} {'-':>11s}"
        yield f"  {target:24s} {rows.num_rows:7,} {status[FAILED]:7,} {status['degenerate']:10,} {numbers}"
    yield from _failures(table)
    texts = Counter(t for t in table["text"].to_pylist() if t)
    for text, count in texts.most_common(EXAMPLES):
        yield f"  {count:7,} x {text!r}"


def _failures(table: pa.Table) -> Iterator[str]:
    failed = table.filter(pc.equal(table["status"], FAILED))
    if failed.num_rows:
        kinds = Counter(failed["error_type"].to_pylist())
        yield "  failures: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common())
        for row in failed.select(["frame_id", "error_type", "error"]).slice(0, EXAMPLES).to_pylist():
            yield f"    {row['frame_id']}: {row['error_type']}: {row['error']}"


def _payload(content: dict[str, Any], name: str) -> Iterator[str]:
    yield name
    if "meta" not in content or not {"attention", "relevance"} & set(content):
        yield from _tree(content)
        return
    meta, info = content["meta"], content["target_info"]
    head = f", {info['head']} head" if info.get("head") else f", token {info.get('token_string')!r}"
    flag = "  (degenerate: no gradient, so no map)" if meta.get("degenerate") else ""
    yield f"  frame      {meta.get('frame_id', content['tag'])}  {content['image_path']}"
    yield f"  target     {meta.get('target')} = {content['target_scalar']:.6g}  ({content['mode']}{head}){flag}"
    yield f"  speed      {content['input_speed_mps']:.1f} m/s"
    yield f"  text       {content['outputs']['language'][0]!r}"
    yield f"  route      {_points(content['outputs']['pred_route'])}"
    yield f"  speed wps  {_points(content['outputs']['pred_speed_wps'])}"
    tiles = f"{meta['num_patch_views']} tiles of {meta['num_image_tokens_per_patch']} image tokens"
    yield f"  picture    {meta['original_width']}x{meta['original_height']}, {tiles}"
    if "spans" in meta:
        yield "  sequence   " + ", ".join(f"{k} {a}..{b - 1}" for k, (a, b) in meta["spans"].items())
    for kind, patches in content.get("relevance", {}).get("patches", {}).items():
        language = content["relevance"]["language"][kind]
        first, last = meta["spans"]["image"]
        share = float(language[first:last].abs().sum() / language.abs().sum())
        shapes = f"language {_shape(language)}, patches {_shape(patches)}"
        yield f"  relevance  {kind}: {shapes}, {share:.0%} on image tokens"
    blocks = content.get("attention", {})
    if blocks:
        yield f"  attention  {len(blocks)} blocks"
    for key, entries in blocks.items():
        parts = (f"{k} {_shape(v)}" if isinstance(v, Tensor) else f"{k} {v}" for k, v in entries[0].items())
        yield f"    {key:20s} " + ", ".join(parts)


def _points(points: Tensor) -> str:
    (x0, y0), (x1, y1) = points[0, 0].tolist(), points[0, -1].tolist()
    length = float(points[0].diff(dim=0).norm(dim=-1).sum())
    return f"{points.shape[1]} points, ({x0:.2f}, {y0:.2f}) to ({x1:.2f}, {y1:.2f}) m, {length:.2f} m long"


def _shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}[{', '.join(map(str, x.shape))}]"


def _tree(value: Any, indent: str = "  ") -> Iterator[str]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(item, (dict, list)) and item:
            yield f"{indent}{key}"
            yield from _tree(item, indent + "  ")
        else:
            yield f"{indent}{key}: {_shape(item) if isinstance(item, torch.Tensor) else item}"
