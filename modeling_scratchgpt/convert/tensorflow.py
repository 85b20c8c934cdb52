"""Read TensorFlow checkpoints (`NAME.index`, `NAME.data-00000-of-00001`), as OpenAI published GPT-2, without TensorFlow.

Notable:
- The index is a sorted string table (LevelDB's format): blocks of prefix-compressed keys with a checksum. The values
  are protocol buffers with the type, shape, offset and checksum of a tensor; the data files are raw arrays.
- All checksums are verified, so truncated and altered files are refused, with the name of the tensor.
- Nothing is executed: `NAME.meta`, which contains the graph, is not read.

Format: LevelDB's doc/table_format.md; tensorflow/core/protobuf/tensor_bundle.proto.
"""

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

MAGIC = 0xDB4775248B80FB57
DTYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}  # types.proto

# CRC-32C by table lookup (Castagnoli's polynomial, reflected).
LANES = 2**14
INITIAL = np.frombuffer(bytes.fromhex("54641f64"), np.uint8)  # takes a register from 0 to its initial value
TABLE: np.ndarray = np.arange(256, dtype=np.uint32)
for _ in range(8):
    TABLE = (TABLE >> 1) ^ (np.uint32(0x82F63B78) * (TABLE & 1))


def read_tensorflow_checkpoint(index: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a checkpoint, by name, from the file that ends in `.index` and the data files in its directory.

    Raises:
        ValueError: a file is of another format, incomplete or damaged; the message names file and tensor.
        OSError: a file is missing.
    """
    try:
        entries = dict(_iterate_table(index.read_bytes()))
        header = _parse_message(entries.pop(b""))
        num_shards = header.get(1, [1])[0]
    except (IndexError, KeyError, struct.error, ValueError) as error:
        raise ValueError(f"{index} is not the index of a TensorFlow checkpoint, or it is damaged ({error}).") from error
    shards: list[np.ndarray] = []
    for shard in range(num_shards):
        path = index.with_suffix(f".data-{shard:05d}-of-{num_shards:05d}")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, but {index} refers to it.")
        shards.append(np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8))
    return {name.decode(): _tensor(name.decode(), _parse_message(entry), shards, index) for name, entry in entries.items()}


def _tensor(name: str, entry: dict[int, list], shards: list[np.ndarray], index: Path) -> np.ndarray:
    number = entry.get(1, [0])[0]
    if number not in DTYPES or 7 in entry:
        raise ValueError(f"{index}: {name} has an unsupported type, or is stored in slices: save it as one float32 tensor.")
    dtype = np.dtype(DTYPES[number])
    dimensions = [_parse_message(dim).get(1, [0])[0] for shape in entry.get(2, []) for dim in _parse_message(shape).get(2, [])]
    shard, offset, size = (entry.get(field, [0])[0] for field in (3, 4, 5))
    expected = dtype.itemsize * int(np.prod(dimensions, dtype=np.int64))
    stored = shards[shard][offset : offset + size] if shard < len(shards) else np.empty(0, np.uint8)
    if size != expected or len(stored) != size:
        raise ValueError(f"{index.stem}: {name} has {len(stored)} of {expected} bytes: a data file is truncated.")
    if _mask(crc32c(stored)) != entry.get(6, [0])[0]:
        raise ValueError(f"{index.stem}: {name} is damaged: its checksum is wrong.")
    return stored.view(dtype).reshape(dimensions)


def _iterate_table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over the keys and values of a sorted string table."""
    footer = table[-48:]
    if len(footer) < 48 or struct.unpack("<Q", footer[40:])[0] != MAGIC:
        raise ValueError("it has no valid footer")
    handles = io.BytesIO(footer)
    _read_varint(handles), _read_varint(handles)  # of a block that is not used
    for _, value in _iterate_block(table, handles):
        yield from _iterate_block(table, io.BytesIO(value))


def _iterate_block(table: bytes, handle: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Iterate over the keys and values of the block whose offset and size are next in `handle`."""
    offset, size = _read_varint(handle), _read_varint(handle)
    block, trailer = table[offset : offset + size + 1], table[offset + size + 1 : offset + size + 5]
    if _mask(crc32c(np.frombuffer(block, np.uint8))) != struct.unpack("<I", trailer)[0]:
        raise ValueError("the checksum of a block is wrong")
    if block[-1] != 0:
        raise ValueError("it is compressed, unlike TensorFlow's checkpoints")
    (num_restarts,) = struct.unpack("<I", block[-5:-1])
    entries, end, key = io.BytesIO(block), len(block) - 5 - 4 * num_restarts, b""
    while entries.tell() < end:
        shared, unshared, length = (_read_varint(entries) for _ in range(3))
        key = key[:shared] + entries.read(unshared)
        yield key, entries.read(length)


def _parse_message(data: bytes) -> dict[int, list]:
    """Parse a protocol buffer into its fields by number: integers, or bytes for fields with a length."""
    fields: dict[int, list] = {}
    stream = io.BytesIO(data)
    while stream.tell() < len(data):
        tag = _read_varint(stream)
        value: int | bytes
        if tag & 7 == 0:
            value = _read_varint(stream)
        elif tag & 7 == 2:
            value = stream.read(_read_varint(stream))
        elif tag & 7 == 5:
            value = struct.unpack("<I", stream.read(4))[0]
        else:
            raise ValueError("it has a field of an unexpected wire type")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _read_varint(stream: BinaryIO) -> int:
    """Read a varint: seven bits per byte; the high bit says that more follow."""
    value = shift = 0
    while True:
        byte = stream.read(1)[0]
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value


def _mask(checksum: int) -> int:
    """Mask a checksum as LevelDB stores it, since a CRC of data that contains CRCs is weak."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: np.ndarray) -> int:
    """CRC-32C of bytes (N,), computed in lanes in parallel: a CRC is linear, so those of consecutive pieces can be combined."""
    length = -(-(len(INITIAL) + len(data)) // LANES)
    padded = np.zeros(LANES * length, np.uint8)  # leading zeros leave the register at 0
    padded[len(padded) - len(data) - len(INITIAL) :] = np.concatenate([INITIAL, data])
    lanes = np.zeros(LANES, np.uint32)
    zeros = np.uint32(1) << np.arange(32, dtype=np.uint32)  # becomes the effect of `length` zero bytes on each bit
    for column in np.ascontiguousarray(padded.reshape(LANES, length).T):
        lanes, zeros = _shift(lanes ^ column), _shift(zeros)
    while len(lanes) > 1:
        lanes = _multiply(zeros, lanes[::2]) ^ lanes[1::2]
        zeros = _multiply(zeros, zeros)
    return int(lanes[0]) ^ 0xFFFFFFFF


def _shift(registers: np.ndarray) -> np.ndarray:
    """Process the lowest byte of each register (N,)."""
    return TABLE[registers & 255] ^ (registers >> 8)


def _multiply(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Multiply a matrix over GF(2), with columns (32,) as integers, by vectors (N,)."""
    result = np.zeros_like(vectors)
    for bit, column in enumerate(matrix):
        result ^= column * ((vectors >> np.uint32(bit)) & np.uint32(1))
    return result
