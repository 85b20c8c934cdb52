"""TensorFlow's checkpoints, read without TensorFlow: `NAME.index` and `NAME.data-00000-of-00001`, as OpenAI published GPT-2.

Notable:
- The index is a sorted string table (LevelDB's format): blocks of keys that share prefixes, each block with a checksum. Its
  values are protocol buffers that say type, shape, place and checksum of a tensor; the data files are the bare numbers.
- Every checksum is verified, so a file that was cut short or altered is found out, by the name of the tensor.
- Nothing is executed: `NAME.meta`, which holds the graph, is not read at all.

Format: LevelDB's doc/table_format.md; tensorflow/core/protobuf/tensor_bundle.proto.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MAGIC = 0xDB4775248B80FB57
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    9: np.dtype("<i8"),
    19: np.dtype("<f2"),
}  # types.proto
LANES = 2**14

# CRC-32C: what each byte does to the checksum so far (Castagnoli's polynomial, bits reversed).
TABLE: np.ndarray = np.arange(256, dtype=np.uint32)
for _ in range(8):
    TABLE = (TABLE >> 1) ^ (np.uint32(0x82F63B78) * (TABLE & 1))


def read_tensorflow_checkpoint(index: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, by its name.

    Args:
        index: the file that ends in `.index`; the data files lie beside it.

    Raises:
        ValueError: a file is not what it should be, incomplete or damaged; the message names file and tensor.
        OSError: a file is missing.
    """
    table = index.read_bytes()
    try:
        entries = dict(_table(table))
        header = _message(entries.pop(b""))
        num_shards = header.get(1, [1])[0]
    except (IndexError, KeyError, struct.error, ValueError) as error:
        raise ValueError(f"{index} is not the index of a TensorFlow checkpoint, or it is damaged ({error}).") from error
    shards: list[np.ndarray] = []
    for shard in range(num_shards):
        path = index.with_suffix(f".data-{shard:05d}-of-{num_shards:05d}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, and {index} needs it.")
        shards.append(np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8))
    return {name.decode(): _tensor(name.decode(), _message(entry), shards, index) for name, entry in entries.items()}


def _tensor(name: str, entry: dict[int, list], shards: list[np.ndarray], index: Path) -> np.ndarray:
    dtype = DTYPES.get(entry.get(1, [0])[0])
    if dtype is None or 7 in entry:
        raise ValueError(f"{index}: {name} is of a type that is not read here, or lies in slices: save it as whole float32.")
    dimensions = [_message(dim).get(1, [0])[0] for shape in entry.get(2, []) for dim in _message(shape).get(2, [])]
    shard, offset, size = (entry.get(field, [0])[0] for field in (3, 4, 5))
    expected = dtype.itemsize * int(np.prod(dimensions, dtype=np.int64))
    stored = shards[shard][offset : offset + size] if shard < len(shards) else np.empty(0, np.uint8)
    if size != expected or len(stored) != size:
        raise ValueError(f"{index.stem}: {name} should be {expected} bytes and is {len(stored)}: a data file is cut short.")
    if _masked(crc32c(stored)) != entry.get(6, [0])[0]:
        raise ValueError(f"{index.stem}: {name} is damaged: its checksum is another.")
    return stored.view(dtype).reshape(dimensions)


def _table(table: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a sorted string table."""
    footer = table[-48:]
    if len(footer) < 48 or struct.unpack("<Q", footer[40:])[0] != MAGIC:
        raise ValueError("it does not end as one")
    _, place = _handle(footer, 0)
    (offset, size), _ = _handle(footer, place)
    for _, value in _block(table, offset, size):
        (offset, size), _ = _handle(value, 0)
        yield from _block(table, offset, size)


def _handle(data: bytes, place: int) -> tuple[tuple[int, int], int]:
    offset, place = _varint(data, place)
    size, place = _varint(data, place)
    return (offset, size), place


def _block(table: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    block, trailer = table[offset : offset + size + 1], table[offset + size + 1 : offset + size + 5]
    if _masked(crc32c(np.frombuffer(block, np.uint8))) != struct.unpack("<I", trailer)[0]:
        raise ValueError("the checksum of a block is another")
    if block[-1] != 0:
        raise ValueError("it is compressed, which TensorFlow's checkpoints are not")
    (num_restarts,) = struct.unpack("<I", block[-5:-1])
    end, place, key = len(block) - 5 - 4 * num_restarts, 0, b""
    while place < end:
        shared, place = _varint(block, place)
        unshared, place = _varint(block, place)
        length, place = _varint(block, place)
        key = key[:shared] + block[place : place + unshared]
        place += unshared + length
        yield key, block[place - length : place]


def _message(data: bytes) -> dict[int, list]:
    """The fields of a protocol buffer by their number: integers, and bytes for whatever has a length."""
    fields: dict[int, list] = {}
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        value: int | bytes
        if tag & 7 == 0:
            value, place = _varint(data, place)
        elif tag & 7 == 2:
            length, place = _varint(data, place)
            value, place = data[place : place + length], place + length
        elif tag & 7 == 5:
            value, place = struct.unpack("<I", data[place : place + 4])[0], place + 4
        else:
            raise ValueError("it holds a field of a kind that is not used there")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number in groups of seven bits, the last one without the high bit; and where the next begins."""
    value = shift = 0
    while True:
        value |= (data[place] & 127) << shift
        shift += 7
        place += 1
        if data[place - 1] < 128:
            return value, place


def _masked(checksum: int) -> int:
    """As checksums are stored, so that none is ever taken of a checksum."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: np.ndarray) -> int:
    """The CRC-32C of bytes. Long ones are cut into lanes that are worked off side by side, and their checksums combined."""
    length = len(data) // LANES
    state, rest = 0, data[length * LANES :].tolist()
    if length:
        lanes = np.full(LANES, 0xFFFFFFFF, dtype=np.uint32)
        for column in np.ascontiguousarray(data[: length * LANES].reshape(LANES, length).T):
            lanes = TABLE[(lanes ^ column) & 255] ^ (lanes >> 8)
        state = _joined(lanes ^ np.uint32(0xFFFFFFFF), length)
    state ^= 0xFFFFFFFF
    for byte in rest:
        state = int(TABLE[(state ^ byte) & 255]) ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def _joined(checksums: np.ndarray, length: int) -> int:
    """The checksum of what neighbours with these checksums make together, a power of two of them, each of so many bytes."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    zero_byte = TABLE[bits & 255] ^ (bits >> 8)  # what a byte of zeros makes of each bit; linear, so of each number
    zeros = bits  # of no bytes
    while length:
        if length & 1:
            zeros = _times(zero_byte, zeros)
        zero_byte, length = _times(zero_byte, zero_byte), length >> 1
    while len(checksums) > 1:
        checksums = _times(zeros, checksums[::2]) ^ checksums[1::2]
        zeros = _times(zeros, zeros)
    return int(checksums[0])


def _times(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """A matrix over bits, one column a number (32,), times vectors (N,)."""
    result = np.zeros_like(vectors)
    for bit, column in enumerate(matrix):
        result ^= column * ((vectors >> np.uint32(bit)) & np.uint32(1))
    return result
