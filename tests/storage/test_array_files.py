"""Arrays in .npz files and in temporary files: the same values, whether they are held in memory or mapped."""

import errno
import io
import mmap
import tempfile

import numpy as np
import pytest

from tpaw_jax.storage import array_files
from tpaw_jax.storage.files import CorruptedFile


@pytest.fixture(params=[100, 10**6], ids=["mapped", "in_memory"])
def mapped(request, monkeypatch):
    """Whether the arrays of these tests, of some hundred bytes, count as large."""
    monkeypatch.setattr(array_files, "LARGE", request.param)
    monkeypatch.setattr(array_files, "_CHUNK", 24)
    return request.param == 100


def is_mapped(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap)


ARRAYS = {
    "flat": np.arange(50, dtype=np.int32),
    "rows": np.linspace(0, 1, 60, dtype=np.float32).reshape(12, 5),
    "columns": np.asfortranarray(np.arange(60).reshape(12, 5)),
    "one": np.array(7),
    "none": np.zeros((0, 3), np.uint8),
}


def test_a_spool_holds_what_was_added(mapped):
    parts = [np.arange(n, dtype=np.int32) for n in (0, 40, 1, 7)]
    spool = array_files.Spool(np.int32)
    for part in parts:
        spool.append(part)
    spool.append_stream(io.BytesIO(np.arange(9, dtype=np.int32).tobytes()))
    array = spool.array()
    np.testing.assert_array_equal(array, np.concatenate([*parts, np.arange(9)]))
    assert array.dtype == np.int32
    assert is_mapped(array) == mapped
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_joined_arrays_are_copies(mapped):
    one = np.arange(40)
    joined = array_files.join((part for part in (one, one[::-2])), int)
    one[:] = 0
    np.testing.assert_array_equal(joined, [*range(40), *range(39, -1, -2)])
    assert array_files.join([], np.float32).dtype == np.float32


def test_arrays_come_back_from_a_file(mapped, tmp_path):
    array_files.write(tmp_path / "a.npz", **ARRAYS)
    found = array_files.read(tmp_path / "a.npz")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    assert is_mapped(found["rows"]) == mapped
    assert list(array_files.read(tmp_path / "a.npz", "one", "flat")) == ["one", "flat"]


def test_equal_arrays_give_equal_bytes_of_any_size(monkeypatch):
    small = bytes(array_files.npz(**ARRAYS))
    monkeypatch.setattr(array_files, "LARGE", 1)
    large = array_files.npz(**ARRAYS)
    assert isinstance(large.obj, mmap.mmap)
    assert bytes(large) == small


def test_damage_is_found(mapped, tmp_path):
    path = tmp_path / "a.npz"
    array_files.write(path, **ARRAYS)
    content = bytearray(path.read_bytes())
    place = content.index(ARRAYS["flat"].tobytes()) + 5
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptedFile, match=r"a.npz: the file is damaged \(BadZipFile: Bad CRC-32"):
        array_files.read(path)
    np.testing.assert_array_equal(array_files.read(path, "rows")["rows"], ARRAYS["rows"])
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorruptedFile, match=r"a.npz: the file is damaged"):
        array_files.read(path)


def test_pickled_objects_are_refused(mapped, tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{"any": "object"}] * 30), allow_pickle=True)
    with pytest.raises(CorruptedFile, match="the file is damaged"):
        array_files.read(tmp_path / "a.npz")


def test_a_full_temporary_directory_is_told_in_a_sentence(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    spool = array_files.Spool(np.int32)
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", full)
    told = rf"^{tempfile.gettempdir()} could not be written: the disk is full\."
    with pytest.raises(OSError, match=told):
        spool.append(np.arange(3))
    monkeypatch.setattr(array_files, "LARGE", 1)
    array_files.write(tmp_path / "a.npz", **ARRAYS)
    with pytest.raises(OSError, match=told):  # the file is not taken for damaged
        array_files.read(tmp_path / "a.npz")


def test_large_arrays_come_back_from_a_bucket(mapped, in_bucket):
    path = in_bucket / "a.npz"
    array_files.write(path, **ARRAYS)
    found = array_files.read(path)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def test_arrays_are_appended_to_spools_of_their_type(tmp_path):
    array_files.write(tmp_path / "a.npz", a=np.arange(5, dtype=np.int32), b=np.ones(3))
    array_files.write(tmp_path / "b.npz", a=np.arange(5, 9, dtype=np.int32), b=np.zeros(2))
    spool = array_files.Spool(np.int32)
    others = [array_files.read(tmp_path / name, into={"a": spool}) for name in ("a.npz", "b.npz")]
    np.testing.assert_array_equal(spool.array(), np.arange(9))
    assert [list(one) for one in others] == [["b"], ["b"]]
    with pytest.raises(CorruptedFile, match="a holds int32, not float32"):
        array_files.read(tmp_path / "a.npz", into={"a": array_files.Spool(np.float32)})
