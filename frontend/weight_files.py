"""Weights stay in their files: reading by memory map, writing one tensor after the other.

A model is held as a *light* proto, whose large initializers are stubs, and their data as arrays by name. What is in an
external file, or in a large ONNX file itself, is mapped: it is read when it is looked at, and the system may drop it
again. Sizes are compared at once, so that a truncated file is named before any work.

Writing goes the same way back: the stubs are written around the data, which is copied array by array, so that no more
than one weight is in memory. The bytes are those that protobuf writes (fields in ascending order).

External data is read from within the model's folder. A link there is followed where ONNX Runtime follows it: within that
folder, and to the folder in which the model's own file is, where the model is a link itself (the cache of the Hugging Face
hub keeps both as links to its blobs). A link to elsewhere is refused: a model from somebody else could name any file of
its reader, whose bytes would be in the result.
"""

import filecmp
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from liar_opt.runtime.errors import ModelError
from liar_opt.runtime.whole_file import kind_of, replace_file, temporary_file

Arrays = Mapping[str, NDArray[Any]]
STUB_LIMIT = 4096
"""Bytes of an initializer up to which it stays within the light proto."""
MAP_FROM = 1 << 28
"""Bytes of a file from which its data stays there. Of smaller ones it is copied: nobody can pull it from under a running
program, and every array is aligned, which a session needs and a place in a file is not."""
EXTERNAL_LIMIT = (1 << 31) - (1 << 20)
"""Bytes of weights above which the output is written with external data (protobuf's own limit is 2 GiB)."""
DATA_KEY = "liar_opt.external_data"
"""Key of the metadata that says which file of external data liar-opt wrote with the model."""
PLAIN = {
    onnx.TensorProto.DataType.Value(name)
    for name in (
        "FLOAT FLOAT16 BFLOAT16 DOUBLE INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64 BOOL COMPLEX64 COMPLEX128"
    ).split()
}
"""Element types that lie in a file as numpy has them in memory."""
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""Field numbers of ``ModelProto.graph``, ``GraphProto.initializer`` and ``TensorProto.raw_data`` (onnx.proto)."""
BYTES = 2
"""Protobuf's wire type of what has a length in front of it."""


# Reading --------------------------------------------------------------------------------------------------------------


def read_model(path: Path, map_from: int | None = None) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Reads a model file: the light proto, and the data of its large initializers.

    Args:
        path: of the file.
        map_from: bytes of a file from which its data stays there; `MAP_FROM` if None.

    Raises:
        ModelError: external data is missing, shorter than the initializers need, or outside the model's folder.
        DecodeError: the file is not ONNX, or truncated.
        OSError: it cannot be read.
    """
    buffers: dict[Path, NDArray[np.uint8]] = {path: _buffer(path)}
    proto = onnx.ModelProto.FromString(_without_data(buffers[path].data, path.name))
    arrays: dict[str, NDArray[Any]] = {}
    outer = {tensor.name for tensor in proto.graph.initializer}
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL or tensor.name in arrays:
            continue
        file, offset = _place(tensor, path)
        size = tensor_bytes(tensor)
        if file not in buffers:
            buffers[file] = _buffer(file)
        if offset + size > buffers[file].size:
            raise ModelError(
                f"external data '{file.name}' of '{path}' ends before initializer '{tensor.name}' does "
                f"({buffers[file].size} bytes, {offset + size} are needed); it is truncated, copy it again"
            )
        data = buffers[file][offset : offset + size]
        if tensor.name in outer and tensor.data_type in PLAIN:
            data = data if buffers[file].size >= (MAP_FROM if map_from is None else map_from) else np.array(data)
            arrays[tensor.name] = data.view(numpy_type(tensor.data_type)).reshape(tuple(tensor.dims))
            continue
        tensor.raw_data = data.tobytes()
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    return proto, arrays


def lightened(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Returns a light copy of a model in memory, and the data of its large initializers; ``proto`` stays as it is.

    Raises:
        ModelError: external data was not loaded, or an initializer holds fewer bytes than its shape needs.
    """
    light = onnx.ModelProto()
    _copy_fields(proto, light, "graph")
    _copy_fields(proto.graph, light.graph, "initializer")
    arrays: dict[str, NDArray[Any]] = {}
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.HasField("raw_data"):
            raise ModelError(
                f"the external data of initializer '{tensor.name}' is not loaded; give the path of the model, or load it"
            )
        raw = tensor.raw_data if tensor.HasField("raw_data") else None
        if raw is not None and len(raw) != tensor_bytes(tensor):
            raise _short(tensor, len(raw), "the model")
        if raw is None or len(raw) <= STUB_LIMIT or tensor.data_type not in PLAIN:
            light.graph.initializer.append(tensor)
            light.graph.initializer[-1].ClearField("data_location")
            del light.graph.initializer[-1].external_data[:]
            continue
        arrays[tensor.name] = np.frombuffer(raw, numpy_type(tensor.data_type)).reshape(tuple(tensor.dims))
        light.graph.initializer.append(stub(tensor.name, tensor.data_type, tensor.dims))
        if tensor.doc_string:
            light.graph.initializer[-1].doc_string = tensor.doc_string
        light.graph.initializer[-1].metadata_props.extend(tensor.metadata_props)
    return light, arrays


def stub(name: str, kind: int, shape: Iterable[int]) -> onnx.TensorProto:
    """Returns an initializer without its data, which is given to whoever needs it by name."""
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="memory")
    return tensor


def completed(light: onnx.ModelProto, arrays: Arrays) -> onnx.ModelProto:
    """Returns the model with the data in it."""
    proto = onnx.ModelProto()
    proto.CopyFrom(light)
    for tensor in proto.graph.initializer:
        if tensor.name in arrays:
            tensor.ClearField("data_location")
            del tensor.external_data[:]
            tensor.raw_data = arrays[tensor.name].tobytes()
    return proto


def with_values(light: onnx.ModelProto, arrays: Arrays, values: Arrays) -> tuple[onnx.ModelProto, dict[str, NDArray[Any]]]:
    """Returns a light model, and its data, with other values in some initializers, of the same shapes and types."""
    proto = onnx.ModelProto()
    proto.CopyFrom(light)
    for tensor in proto.graph.initializer:
        if tensor.name in values and tensor.name not in arrays:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[tensor.name]), tensor.name))
    return proto, {name: values.get(name, array) for name, array in arrays.items()}


def without_data(light: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the model with inputs in the place of stubs: enough for a checker, which looks for their data otherwise."""
    proto = onnx.ModelProto()
    proto.CopyFrom(light)
    stubs = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    kept = [t for t in light.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    proto.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in stubs)
    proto.graph.ClearField("initializer")
    proto.graph.initializer.extend(kept)
    return proto


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Returns how many bytes the data of a tensor has; KeyError for an element type that ONNX does not know."""
    elements = math.prod(int(n) for n in tensor.dims)  # of a broken file: numpy's would go round
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    if name in ("INT4", "UINT4", "FLOAT4E2M1"):
        return (elements + 1) // 2
    if name in ("INT2", "UINT2"):
        return (elements + 3) // 4
    return elements * numpy_type(tensor.data_type).itemsize


def numpy_type(kind: int) -> np.dtype[Any]:
    """Returns numpy's type for an ONNX element type; bfloat16 is that of ml_dtypes."""
    # Older releases of onnx say float32 for bfloat16.
    bfloat16 = kind == onnx.TensorProto.BFLOAT16
    result: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16 if bfloat16 else onnx.helper.tensor_dtype_to_np_dtype(kind))
    return result


def element_type(dtype: np.dtype[Any]) -> int:
    """Returns the ONNX element type for numpy's."""
    if dtype == ml_dtypes.bfloat16:
        return int(onnx.TensorProto.BFLOAT16)
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))


def _short(tensor: onnx.TensorProto, size: int, name: str) -> ModelError:
    return ModelError(
        f"initializer '{tensor.name}' of {name} has {size} bytes where its shape {list(tensor.dims)} needs "
        f"{tensor_bytes(tensor)}; it is truncated, export it again"
    )


def external_files(path: Path) -> set[Path]:
    """Returns the files beside a model file in which its tensors are, wherever in the model they stand.

    None where the file is no model: whoever reads it will say so.
    """
    try:
        proto = onnx.ModelProto.FromString(_without_data(_buffer(path).data, path.name))
        return {path.parent / name for name in _locations(proto) - {path.name}}
    except (ModelError, DecodeError, OSError):
        return set()


def _locations(message: Message) -> set[str]:
    """Returns what all tensors within a message say of where their data is."""
    if isinstance(message, onnx.TensorProto):
        return {e.value for e in message.external_data if e.key == "location"}
    found: set[str] = set()
    for described, value in message.ListFields():
        if described.message_type is None:
            continue
        for part in value if isinstance(value, Iterable) else (value,):
            found |= _locations(part)
    return found


def _written_data(path: Path) -> set[Path]:
    """Returns the external data that liar-opt wrote with the model that is at ``path``, if it did."""
    try:
        proto = onnx.ModelProto.FromString(_without_data(_buffer(path).data, path.name))
    except (ModelError, DecodeError, OSError):
        return set()
    said = {p.value for p in proto.metadata_props if p.key == DATA_KEY}
    return {path.with_name(name) for name in said & _locations(proto) if _data_name(name, path.name)}


def within(file: Path, *folders: Path) -> bool:
    """Returns whether a file is in one of some folders when links are followed."""
    place = file.resolve()
    return any(place.is_relative_to(folder.resolve()) for folder in folders)


def _buffer(path: Path) -> NDArray[np.uint8]:
    if not path.stat().st_size:  # cannot be mapped
        return np.zeros(0, np.uint8)
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def _place(tensor: onnx.TensorProto, path: Path) -> tuple[Path, int]:
    """Returns the file in which the data of an initializer is, and where it begins."""
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    if not location or any(
        p.is_absolute() or ".." in p.parts for p in (PurePosixPath(location), PureWindowsPath(location))
    ):
        raise ModelError(
            f"external data '{location}' of '{path}' (initializer '{tensor.name}') is not within the model's folder; "
            "put it beside the model and save the model again"
        )
    file = path.parent / location
    if not file.is_file():
        raise ModelError(f"external data '{location}' of '{path}' is missing; put it beside the model as it was exported")
    if not within(file, path.parent, path.resolve().parent):
        raise ModelError(
            f"external data '{location}' of '{path}' is a link that leads out of the model's folder, to "
            f"'{file.resolve()}'; put the file itself beside the model"
        )
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", tensor_bytes(tensor)))
    except ValueError:
        offset, length = -1, -1
    if offset < 0 or length != tensor_bytes(tensor):
        raise ModelError(
            f"initializer '{tensor.name}' of '{path}' has {entries.get('length')} bytes at {entries.get('offset', 0)} of "
            f"'{location}', its shape {list(tensor.dims)} needs {tensor_bytes(tensor)}; export the model again"
        )
    return file, offset


def _without_data(file: memoryview, name: str) -> bytes:
    """Returns a serialised model without the data of its large initializers, which are said to be external, in ``name``."""
    result = bytearray()
    for field, wire, start, inner, end in _fields(file, 0, len(file)):
        if field != GRAPH or wire != BYTES:
            result += file[start:end]
            continue
        graph = bytearray()
        for number, kind, begin, content, stop in _fields(file, inner, end):
            if number == INITIALIZER and kind == BYTES and stop - content > STUB_LIMIT:
                tensor = _detached(file, content, stop, name)
                graph += _tag(INITIALIZER) + _varint(len(tensor)) + tensor
            else:
                graph += file[begin:stop]
        result += _tag(GRAPH) + _varint(len(graph)) + graph
    return bytes(result)


def _detached(file: memoryview, start: int, end: int, name: str) -> bytes:
    parts = list(_fields(file, start, end))
    raw = [p for p in parts if p[0] == RAW_DATA and p[1] == BYTES and p[4] - p[3] > STUB_LIMIT]
    if len(raw) != 1:
        return bytes(file[start:end])
    head = b"".join(bytes(file[p[2] : p[4]]) for p in parts if p is not raw[0])
    tensor = onnx.TensorProto.FromString(head)
    if tensor.data_type not in PLAIN:
        return bytes(file[start:end])
    _, _, _, offset, stop = raw[0]
    if stop - offset != tensor_bytes(tensor):
        raise _short(tensor, stop - offset, f"'{name}'")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", name), ("offset", offset), ("length", stop - offset)):
        tensor.external_data.add(key=key, value=str(value))
    return bytes(tensor.SerializeToString())


def _fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Yields (number, wire type, start, start of the content, end) of each field of a message.

    Raises:
        DecodeError: the message is cut off or is none.
    """
    position = start
    while position < end:
        key, content = _read_varint(data, position, end)
        number, wire = key >> 3, key & 7
        if wire == 0:
            _, stop = _read_varint(data, content, end)
        elif wire == BYTES:
            length, content = _read_varint(data, content, end)
            stop = content + length
        elif wire in (1, 5):
            stop = content + (8 if wire == 1 else 4)
        else:
            raise DecodeError(f"wire type {wire}")
        if stop > end or not number:
            raise DecodeError("a field is longer than its message")
        yield number, wire, position, content, stop
        position = stop


def _read_varint(data: memoryview, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise DecodeError("a number is cut off")


# Writing --------------------------------------------------------------------------------------------------------------


def write_model(light: onnx.ModelProto, arrays: Arrays, path: Path, keep: Iterable[Path] = ()) -> None:
    """Writes a model whole or not at all: to temporary files in the same folder, then moved into place.

    Weights above 2 GiB go to ``path`` + ``.data``. Where there is such a file it stays as long as the model that is
    replaced names it, so the new data gets another name (``path`` + ``.<8 digits>.data``), which the new model names. Data
    that liar-opt wrote with the model that is replaced is removed behind it.

    Args:
        light: the model; what has its data in ``arrays`` is a stub.
        arrays: the data by name.
        path: where to; a file is replaced.
        keep: files that are not removed.

    Raises:
        OSError: the folder cannot be written or is full; nothing is left behind.
    """
    light = _without_data_key(light)
    with temporary_file(path) as temporary:
        old = {file for file in _written_data(path) if not any(k.exists() and file.samefile(k) for k in keep)}
        if sum(a.nbytes for a in arrays.values()) <= EXTERNAL_LIMIT:
            with temporary.open("wb") as stream:
                _write_inside(light, arrays, stream)
            replace_file(temporary, path, old=old)
            return
        with temporary_file(path) as data:
            with data.open("wb") as stream:
                light = _write_external(light, arrays, stream)
            place = _data_place(path, data, old)
            with temporary.open("wb") as stream:
                _write(stream, _located(light, place.name).SerializeToString())
            same = place in old  # the same bytes: they stay
            replace_file(temporary, path, None if same else (data, place), old - {place})


def _without_data_key(light: onnx.ModelProto) -> onnx.ModelProto:
    """Returns a model without the name of another file's data."""
    if all(p.key != DATA_KEY for p in light.metadata_props):
        return light
    result = onnx.ModelProto()
    result.CopyFrom(light)
    del result.metadata_props[:]
    result.metadata_props.extend(p for p in light.metadata_props if p.key != DATA_KEY)
    return result


def _data_place(path: Path, data: Path, old: Iterable[Path]) -> Path:
    """Returns the place for data: no file is there, or one of ``old`` that is equal."""
    plain = path.with_name(f"{path.name}.data")
    for place in old:
        if place.is_file() and filecmp.cmp(place, data, shallow=False):
            return place
    if kind_of(plain) is None:
        return plain
    with data.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    names = (path.with_name(f"{path.name}.{digest[i : i + 8]}.data") for i in range(len(digest) - 7))
    return next(place for place in names if kind_of(place) is None)


def _data_name(name: str, model: str) -> bool:
    """Returns whether liar-opt gives the data of a model such a name."""
    return re.fullmatch(re.escape(model) + r"(\.[0-9a-f]{8})?\.data", name) is not None


def _located(light: onnx.ModelProto, location: str) -> onnx.ModelProto:
    """Says in which file the data is that was written (`_write_external`)."""
    for tensor in light.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and not entry.value:
                entry.value = location
    light.metadata_props.add(key=DATA_KEY, value=location)
    return light


def _write(stream: BinaryIO, data: bytes | memoryview) -> None:
    stream.write(data)


def _write_external(light: onnx.ModelProto, arrays: Arrays, stream: BinaryIO) -> onnx.ModelProto:
    """Writes the data and returns a model of its own that says where it is; the file has no name yet."""
    result = onnx.ModelProto()
    result.CopyFrom(light)
    offset = 0
    for tensor in result.graph.initializer:
        if tensor.name not in arrays:
            continue
        value = as_bytes(arrays[tensor.name])
        # Whoever maps the file wants weights on a page's boundary.
        padding = -offset % 4096
        _write(stream, bytes(padding))
        offset += padding
        tensor.data_location = onnx.TensorProto.EXTERNAL
        del tensor.external_data[:]
        for key, entry in (("location", ""), ("offset", offset), ("length", value.nbytes)):
            tensor.external_data.add(key=key, value=str(entry))
        _write(stream, value)
        offset += value.nbytes
    return result


def _write_inside(light: onnx.ModelProto, arrays: Arrays, stream: BinaryIO) -> None:
    """Writes the model with its data in it, field by field as protobuf orders them."""
    before, after = _split(light, GRAPH)
    head, tail = _split(light.graph, INITIALIZER)
    parts: list[tuple[bytes, NDArray[Any] | None, bytes]] = []
    for tensor in light.graph.initializer:
        value = arrays.get(tensor.name)
        if value is None:
            content = tensor.SerializeToString()
            parts.append((_tag(INITIALIZER) + _varint(len(content)) + content, None, b""))
            continue
        first = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims).SerializeToString()
        first += _tag(RAW_DATA) + _varint(value.nbytes)
        last = onnx.TensorProto(doc_string=tensor.doc_string or None, metadata_props=tensor.metadata_props)
        end = last.SerializeToString()
        parts.append((_tag(INITIALIZER) + _varint(len(first) + value.nbytes + len(end)) + first, value, end))
    size = len(head) + len(tail) + sum(len(p) + (0 if v is None else v.nbytes) + len(e) for p, v, e in parts)
    _write(stream, before + _tag(GRAPH) + _varint(size) + head)
    for part, value, end in parts:
        _write(stream, part)
        if value is not None:
            _write(stream, as_bytes(value))
        _write(stream, end)
    _write(stream, tail + after)


def as_bytes(array: NDArray[Any]) -> memoryview:
    """Returns the bytes of an array in C order, copied only where it lies in another."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _split(message: Message, number: int) -> tuple[bytes, bytes]:
    """Returns a message serialised, what comes before field ``number`` and what comes behind it."""
    before, after = type(message)(), type(message)()
    for described, _ in message.ListFields():
        if described.number != number:
            target = before if described.number < number else after
            _copy_field(message, target, described.name)
    return before.SerializeToString(), after.SerializeToString()


def _copy_fields(source: Message, target: Message, left_out: str) -> None:
    for described, _ in source.ListFields():
        if described.name != left_out:
            _copy_field(source, target, described.name)


def _copy_field(source: Message, target: Message, name: str) -> None:
    value = getattr(source, name)
    if hasattr(value, "MergeFrom"):
        getattr(target, name).MergeFrom(value)
    else:
        setattr(target, name, value)


def _tag(number: int) -> bytes:
    return _varint(number << 3 | BYTES)


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)
