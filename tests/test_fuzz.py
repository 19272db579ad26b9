"""Readers of what comes from outside, given damaged and made-up input: they read it, or say what is wrong.

`benchmarks/fuzz.py` gives the same readers far more of it, guided by coverage.
"""

import readers
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "number"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)
QUICK = settings(
    max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck)
)


def changed(content: bytes, changes) -> bytes:
    """The content with bits flipped, its end cut, bytes inserted, or eight bytes made a huge number."""
    for kind, where, bits in changes:
        place = int(where * len(content))
        if kind == "cut":
            content = content[:place]
        elif kind == "insert":
            content = content[:place] + bits + content[place:]
        elif kind == "number":
            content = content[:place] + b"\xff\xff\xff\xff\xff\xff\xff\x7f" + content[place + 8 :]
        elif place < len(content):
            content = content[:place] + bytes([content[place] ^ (bits[0] or 1)]) + content[place + 1 :]
    return content


def pytest_generate_tests(metafunc):
    metafunc.parametrize("name", readers.READERS)


@QUICK
@given(changes=CHANGES)
def test_a_damaged_file_is_read_or_told(name, changes, tmp_path_factory):
    readers.check(name, changed(readers.whole(name), changes), tmp_path_factory.getbasetemp())


@QUICK
@given(content=st.binary(max_size=200))
@example(content=b"")
@example(content=b"[" * 100_000)
@example(content=b"\x00" * 64)
@example(content=b'{"a": ' * 50_000)
@example(content=b"1" * 5000)
def test_anything_is_read_or_told(name, content, tmp_path_factory):
    readers.check(name, content, tmp_path_factory.getbasetemp())
