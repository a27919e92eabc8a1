"""tf.train.Example without TensorFlow: bytes in, arrays out, only for the keys that are asked for.

The message type is described here at run time and lives in a pool of its own, so that it cannot clash with a
TensorFlow in the same process (tensorflow/core/example/{example,feature}.proto).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from vla_ray.errors import DataError

Values: TypeAlias = list[bytes] | NDArray[np.float32] | NDArray[np.int64]

_PACKAGE = "vla_ray"
_FIELD = descriptor_pb2.FieldDescriptorProto


def parse_example(data: bytes, keys: Iterable[str]) -> dict[str, Values]:
    """The values of those keys that the record has: a list of bytes, or a flat float32 or int64 array.

    Raises:
        DataError: not a tf.train.Example.
    """
    message = _EXAMPLE()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise DataError(f"is not a tf.train.Example ({error})") from error
    features = message.features.feature
    return {key: _values(features[key]) for key in keys if key in features}


def serialise_example(values: Mapping[str, Sequence[bytes] | NDArray[Any]]) -> bytes:
    """The inverse: floating-point arrays are stored as float32, all other arrays as int64."""
    message = _EXAMPLE()
    for key, value in values.items():
        feature = message.features.feature[key]
        if not isinstance(value, np.ndarray):
            feature.bytes_list.value.extend(value)
        elif value.dtype.kind == "f":
            feature.float_list.value.extend(value.ravel().tolist())
        else:
            feature.int64_list.value.extend(value.ravel().tolist())
    return message.SerializeToString(deterministic=True)


def _values(feature: Any) -> Values:
    kind = feature.WhichOneof("kind")
    if kind == "float_list":
        return np.array(feature.float_list.value, dtype=np.float32)
    if kind == "int64_list":
        return np.array(feature.int64_list.value, dtype=np.int64)
    return list(feature.bytes_list.value)  # also for a feature without any value


def _message_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="vla_ray/example.proto", package=_PACKAGE, syntax="proto3")
    for name, kind in (
        ("BytesList", _FIELD.TYPE_BYTES),
        ("FloatList", _FIELD.TYPE_FLOAT),
        ("Int64List", _FIELD.TYPE_INT64),
    ):
        file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=_FIELD.LABEL_REPEATED)

    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes_list", "float_list", "int64_list"), start=1):
        list_type = f".{_PACKAGE}.{name.title().replace('_', '')}"
        _add_message(feature, name, number, list_type).oneof_index = 0

    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_FIELD.TYPE_STRING, label=_FIELD.LABEL_OPTIONAL)
    _add_message(entry, "value", 2, f".{_PACKAGE}.Feature")
    _add_message(features, "feature", 1, f".{_PACKAGE}.Features.FeatureEntry").label = _FIELD.LABEL_REPEATED

    _add_message(file.message_type.add(name="Example"), "features", 1, f".{_PACKAGE}.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


def _add_message(parent: Any, name: str, number: int, type_name: str) -> Any:
    return parent.field.add(
        name=name, number=number, type=_FIELD.TYPE_MESSAGE, type_name=type_name, label=_FIELD.LABEL_OPTIONAL
    )


_EXAMPLE = _message_class()
