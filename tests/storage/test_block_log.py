"""Blocks of arrays: whole ones are found whatever surrounds them, and no other is."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tpaw_jax.storage import block_log

BLOCKS = [block_log.block(a=np.arange(n, dtype=np.int32), b=np.float32([n])) for n in range(4)]


def found(content):
    return [int(arrays["b"][0]) for arrays in block_log.intact_blocks(content)]


def test_blocks_come_back_with_their_places():
    content = b"".join(BLOCKS)
    assert [content[start:end] for start, end in block_log.intact_spans(content)] == BLOCKS
    for n, arrays in enumerate(block_log.intact_blocks(content)):
        np.testing.assert_array_equal(arrays["a"], np.arange(n))
    assert found(content) == [0, 1, 2, 3]
    assert found(b"") == []


@given(place=st.integers(0, sum(map(len, BLOCKS)) - 1), value=st.integers(1, 255))
def test_a_damaged_byte_costs_its_block(place, value):
    content = bytearray(b"".join(BLOCKS))
    content[place] ^= value
    damaged = int(np.searchsorted(np.cumsum([len(one) for one in BLOCKS]), place, side="right"))
    assert found(bytes(content)) == [n for n in range(4) if n != damaged]


@given(end=st.integers(0, sum(map(len, BLOCKS))), between=st.binary(max_size=40))
def test_what_is_cut_or_between_blocks_is_skipped(end, between):
    whole = np.cumsum([len(one) for one in BLOCKS])
    assert found(b"".join(BLOCKS)[:end]) == list(range(np.count_nonzero(whole <= end)))
    assert found(between.join([b"", *BLOCKS, b""])) == [0, 1, 2, 3]
