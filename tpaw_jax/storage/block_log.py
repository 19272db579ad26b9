"""Files of blocks of arrays that grow at their end. Each block has a checksum, so damage costs the blocks it touches.

A block is a header and an .npz file. The header holds a magic word, the bytes of the .npz file and their CRC-32.
"""

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np

_HEADER = struct.Struct("<8sII")
_MAGIC = b"\x93TPAWBLK"


def block(**arrays: np.ndarray) -> bytes:
    """The bytes of a block, to be written at the end of a file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type] # numpy's stub takes names for options
    content = buffer.getvalue()
    return _HEADER.pack(_MAGIC, len(content), zlib.crc32(content)) + content


def intact_blocks(content: bytes) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of each intact block of a file, in order."""
    for start, end in intact_spans(content):
        with np.load(io.BytesIO(content[start + _HEADER.size : end]), allow_pickle=False) as arrays:
            yield dict(arrays)


def intact_spans(content: bytes) -> Iterator[tuple[int, int]]:
    """The first byte and the end of each intact block of a file, in order."""
    start = content.find(_MAGIC)
    while 0 <= start <= len(content) - _HEADER.size:
        _, size, checksum = _HEADER.unpack_from(content, start)
        first = start + _HEADER.size
        payload = content[first : first + size]
        if len(payload) == size and zlib.crc32(payload) == checksum:
            yield start, first + size
            start = content.find(_MAGIC, first + size)
        else:
            start = content.find(_MAGIC, start + 1)
