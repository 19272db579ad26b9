"""Meshes: presets, topologies and what is refused."""

import pytest

from tpaw_jax import sharding, tpu
from tpaw_jax.config import MeshConfig


def test_topologies_are_read_and_refused():
    assert tpu.parse_topology("v5e:16x16").chips == 256
    assert tpu.parse_topology("2 x v5e:16x16").chips == 512
    assert tpu.parse_topology("v5p:4x4x4", slices=3).name == "3 x v5p:4x4x4"
    for wrong in ("v5e", "v5e-16", "v9:4x4", "v5e:4by4"):
        with pytest.raises(ValueError, match="is no topology"):
            tpu.parse_topology(wrong)


def test_presets_split_parameters_over_a_slice_and_rows_over_slices():
    assert sharding.PRESETS["v5e-16"] == MeshConfig(data=1, fsdp=16)
    assert sharding.PRESETS["v5e-256"] == MeshConfig(data=16, fsdp=16)
    assert sharding.PRESETS["2 x v5e-256"] == MeshConfig(data=32, fsdp=16)
    assert sharding.PRESETS["v5p-64"] == MeshConfig(data=1, fsdp=64)
    assert dict(sharding.make_mesh(MeshConfig(preset="host")).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    with pytest.raises(ValueError, match="known are"):
        sharding.make_mesh(MeshConfig(preset="v5e-17"))


def test_meshes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not cover the 8 devices"):
        sharding.make_mesh(MeshConfig(data=3, fsdp=2))
    with pytest.raises(ValueError, match=r"sampling\.tensor is 3"):
        sharding.sampling_mesh(3)
