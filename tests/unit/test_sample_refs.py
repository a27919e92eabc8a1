"""Which samples an inference run asks about: the same order, numbers and names in every resume."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vla_ray.data.cast.instructions import ATOMIC
from vla_ray.data.prepared import PreparedDataset, read_group
from vla_ray.data.sample_refs import SampleRef, parse_variants, sample_refs
from vla_ray.errors import ConfigError, DataError
from vla_ray.stages.work import WorkFrame, WorkItem
from vla_ray.storage.files import Location


def test_every_sample_of_a_split_is_found_where_it_is(corridors: Path) -> None:
    dataset = PreparedDataset.open(str(corridors))
    refs = sample_refs(dataset, "val")
    assert [ref.number for ref in refs] == list(range(dataset.rows("val")))
    assert len({ref.image_filename for ref in refs}) == len(refs)
    for ref in refs[::17]:
        row = read_group(Location.of(ref.path), ref.group).to_pylist()[ref.row]
        assert (row["sample_id"], row["dataset"]) == (ref.frame_id, ref.dataset)


def test_a_subset_keeps_numbers_and_names(corridors: Path) -> None:
    dataset = PreparedDataset.open(str(corridors))
    whole = sample_refs(dataset, "val")
    assert sample_refs(dataset, "val", every=3, limit=5) == whole[::3][:5]
    assert whole[6].image_filename.startswith("sample_000006_")


def test_permuted_instructions_are_others(corridors: Path) -> None:
    refs = sample_refs(PreparedDataset.open(str(corridors)), "val", permute_seed=1)
    own = [read_group(Location.of(r.path), r.group, ["instruction"]).to_pylist()[r.row]["instruction"] for r in refs]
    given = [ref.permuted for ref in refs]
    assert sorted(own) == sorted(text for text in given if text)
    assert all(a != b for a, b in zip(own, given, strict=True))


def test_variants_of_an_instruction() -> None:
    ref = SampleRef("d/val/s:0/0000", 0, "d", "/x.parquet", 0, 0, permuted="stop here")
    assert ref.instruction("given", "turn left") == "turn left"
    assert ref.instruction("permuted", "turn left") == "stop here"
    assert ref.instruction("opposite", "turn left") == "turn right"
    assert ref.instruction("opposite", "find the exit sign") is None
    assert ref.instruction("go to the red door", "turn left") == "go to the red door"


def test_variants_as_they_are_typed() -> None:
    assert parse_variants("given") == ("given",)
    assert parse_variants(["atomic", "permuted"]) == ("given", *ATOMIC, "permuted")
    assert parse_variants(["go to  the red door", "stop"]) == ("given", "go to the red door", "stop")
    with pytest.raises(ConfigError, match=r"'permutd' is unknown.*Did you mean 'permuted'"):
        parse_variants("permutd")


def test_refs_travel_in_work_items() -> None:
    ref = SampleRef("d/val/s:0/0000", 3, "d", "s3://b/x.parquet", 1, 2, "stop")
    item = WorkItem((WorkFrame(ref, "images"),), ("given", "stop"))
    assert WorkItem.from_json(item.to_json()) == item


def test_a_split_that_is_not_there(corridors: Path) -> None:
    with pytest.raises(DataError, match=r"no samples of the split 'test'; it has train, val\. Set split"):
        sample_refs(PreparedDataset.open(str(corridors)), "test")


def test_two_samples_of_one_id_are_refused(corridors: Path, tmp_path: Path) -> None:
    copy = tmp_path / "d"
    shutil.copytree(corridors, copy)
    file = next(f for f in PreparedDataset.open(str(copy)).files if f.split == "val")
    table = pq.read_table(copy / file.path)
    ids = table["sample_id"].to_pylist()
    ids[1] = ids[0]
    table = table.set_column(table.schema.get_field_index("sample_id"), table.schema.field("sample_id"), pa.array(ids))
    pq.write_table(table, copy / file.path, row_group_size=file.row_groups[0])
    with pytest.raises(DataError, match="twice: predictions could not be told apart"):
        sample_refs(PreparedDataset.open(str(copy)), "val")
