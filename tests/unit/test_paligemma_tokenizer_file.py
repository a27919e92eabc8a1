"""`tokenizers.pt`: readable without unpickling, and refused when it is not what the weights learnt."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_ray.errors import CheckpointError
from vla_ray.models.paligemma.actions import ActionNormalizer, ActionTokenizer
from vla_ray.models.paligemma.tokenizer_file import load_decoding, load_tokenizer, save_tokenizer
from vla_ray.storage.location import Location

TOKENIZER = ActionTokenizer(128, 4, ActionNormalizer("quantile", (0.5, 0.0), (1.2, 0.7)))


@pytest.fixture
def file(tmp_path: Path) -> Location:
    location = Location.of(tmp_path / "tokenizers.pt")
    save_tokenizer(location, TOKENIZER, first_action_id=256000)
    return location


def test_round_trip(file: Location) -> None:
    found = load_tokenizer(file, num_bins=128, num_steps=4, first_action_id=256000, fingerprint=TOKENIZER.fingerprint)
    assert found == TOKENIZER
    assert found.fingerprint == TOKENIZER.fingerprint


def test_it_is_primitives_and_tensors(file: Location) -> None:
    content = torch.load(file.path, weights_only=True)
    assert content["format"] == "vla_ray.action_tokenizer"
    assert content["units"] == "waypoint_spacings"
    assert content["token_map"] == {"scheme": "loc", "first_id": 256000, "count": 128}
    assert np.array_equal(content["action_tokenizer"]["centers"].numpy(), TOKENIZER.centers())
    assert {"version", "action_normalizer", "prompt_template", "fingerprint"} <= set(content)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"num_bins": 256}, "action.vocab_size is 128 there, 256 here"),
        ({"num_steps": 8}, "action.num_steps is 4 there, 8 here"),
        ({"first_action_id": 461}, "first action token's id is 256000 there, 461 here"),
        ({"fingerprint": ActionTokenizer().fingerprint}, "the fingerprint is"),
    ],
)
def test_mismatches(file: Location, expected: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as e:
        load_tokenizer(file, **expected)
    assert "\n" not in str(e.value)


def _scale(content: dict[str, Any]) -> None:
    content["action_normalizer"]["scale"] *= 2


def _no_units(content: dict[str, Any]) -> None:
    del content["units"]


def _version(content: dict[str, Any]) -> None:
    content["version"] = 99


def _map(content: dict[str, Any]) -> None:
    content["token_map"] = {"scheme": "new", "first_id": 1, "count": 128}


def _decoding(content: dict[str, Any]) -> None:
    content["decoding"] = "backwards"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_scale, "does not match its content"),
        (_no_units, "incomplete"),
        (_version, "version 99"),
        (_map, "damaged"),
        (_decoding, "'backwards'; known: autoregressive, parallel"),
    ],
)
def test_damage(file: Location, damage: Any, message: str) -> None:
    content = torch.load(file.path, weights_only=True)
    damage(content)
    torch.save(content, file.path)
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(file)


def test_older_files_do_not_say_how_actions_are_decoded(file: Location) -> None:
    content = torch.load(file.path, weights_only=True)
    del content["decoding"]
    torch.save(content, file.path)
    assert load_decoding(file) == "autoregressive"
    assert load_tokenizer(file, decoding="autoregressive") == TOKENIZER
    with pytest.raises(CheckpointError, match="the decoding is autoregressive there, parallel here"):
        load_tokenizer(file, decoding="parallel")


class Boom:
    """What the original scripts stored: an object. Unpickling it would run code."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("it was unpickled",))


def test_pickled_objects_are_not_loaded(tmp_path: Path) -> None:
    for name, write in (("a.pt", torch.save), ("b.pt", lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2)))):
        write({"action_tokenizer": Boom()}, tmp_path / name)  # type: ignore[operator]
        with pytest.raises(CheckpointError, match="never loaded"):
            load_tokenizer(Location.of(tmp_path / name))


def test_missing_cut_or_something_else(file: Location, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no"):
        load_tokenizer(Location.of(tmp_path / "nothing.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_tokenizer(Location.of(tmp_path / "list.pt"))
    Path(file.path).write_bytes(Path(file.path).read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tokenizer(file)
