"""Maps on disk: what is read back is what was made, however small its values; tables are whole or refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vla_ray.data.tiles import Tiler
from vla_ray.errors import StorageError
from vla_ray.explain.heatmap import HeatMap
from vla_ray.explain.methods import METHODS
from vla_ray.schema import MAPS
from vla_ray.stages.maps import MadeMap, read_map
from vla_ray.storage.files import Location
from vla_ray.storage.fragments import fragment_path, read_rows, write_rows

_, GEOMETRY = Tiler(28, 2, True, True)(np.zeros((60, 120, 3), np.uint8))


def made(values: np.ndarray, **columns: object) -> MadeMap:
    heat = HeatMap(values.astype(np.float32), GEOMETRY, values[:, : len(values)].astype(np.float32))
    return MadeMap(METHODS["relevancy"], "positive", heat, columns, values / 7)


@pytest.mark.parametrize("size", [1e-9, 1.0, 3e6])
def test_a_map_survives_the_disk(size: float, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(4, 8)) * size
    row = made(values, share_image=0.25, completeness_error=0.01).row("s/f", "s", "curv_energy")
    place = Location.of(tmp_path / "a.parquet")
    write_rows(place, [row], MAPS)
    ((path, table),) = read_rows(Location.of(tmp_path), ["a.parquet"], MAPS)
    back = table.to_pylist()[0]
    assert (path, back["method"], back["direction"], back["share_image"]) == (
        "a.parquet",
        "relevancy",
        "positive",
        0.25,
    )
    heat = read_map(back)
    assert heat.geometry == GEOMETRY
    assert np.abs(heat.values - values).max() < 1e-3 * np.abs(values).max()
    assert heat.thumbnail is not None
    assert heat.thumbnail.shape == (4, 4)
    error = np.array(back["standard_error"], np.float32) * back["scale"]
    assert np.abs(error - values.ravel() / 7).max() < 1e-3 * np.abs(values).max()
    assert json.loads(back["geometry"])["thumbnail"] is True


def test_a_map_of_zeros() -> None:
    row = made(np.zeros((4, 8))).row("s/f", "s", "curv_energy")
    assert row["scale"] == 1
    assert not row["values"].any()


def test_a_table_is_named_by_its_keys_in_any_order() -> None:
    assert fragment_path([("a", "b"), ("c", "d")]) == fragment_path([("c", "d"), ("a", "b")])
    assert fragment_path([("a", "b")]) != fragment_path([("ab", "")])


def test_damaged_and_foreign_tables_are_refused(tmp_path: Path) -> None:
    root = Location.of(tmp_path)
    with pytest.raises(ValueError, match="no columns"):
        write_rows(root / "a.parquet", [{"frame_id": "f", "colour": 1}], MAPS)
    assert not (tmp_path / "a.parquet").exists()
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(StorageError, match="is damaged"):
        list(read_rows(root, ["b.parquet"], MAPS))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"frame_id": ["f"]}), tmp_path / "c.parquet")
    with pytest.raises(StorageError, match=r"lacks .*values.*another version"):
        list(read_rows(root, ["c.parquet"], MAPS))
    with pytest.raises(StorageError, match="no such file"):
        list(read_rows(root, ["d.parquet"], MAPS))
