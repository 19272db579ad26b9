"""Meshes: presets, topologies, reduce-scatter in stages, and the errors."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from tpaw_jax.config import MeshConfig
from tpaw_jax.models.parallel import collectives
from tpaw_jax.runtime import host, sharding, tpu


def test_compiler_options_change_those_of_the_devices():
    on_tpu = SimpleNamespace(devices=np.full(16, SimpleNamespace(device_kind="TPU v5 lite")))
    own = tpu.COMPILER_OPTIONS["v5e"]
    assert tpu.options_of(on_tpu, ()) == own
    larger = SimpleNamespace(devices=np.full(32, on_tpu.devices[0]))
    assert own.keys() - tpu.options_of(larger, ()) == {"xla_tpu_enable_async_all_to_all"}
    changed = tpu.options_of(on_tpu, ["xla_enable_async_all_reduce=", "xla_tpu_scoped_vmem_limit_kib=1", "xla_new=a=b"])
    assert "xla_enable_async_all_reduce" not in changed
    assert changed["xla_tpu_scoped_vmem_limit_kib"] == "1"
    assert changed["xla_new"] == "a=b"
    assert len(changed) == len(own)
    assert tpu.options_of(sharding.make_mesh(MeshConfig()), ()) == {}


def test_compiler_options_that_the_compiler_does_not_know_are_told():
    mesh = sharding.make_mesh(MeshConfig())
    tpu.check_options(mesh, ["xla_backend_optimization_level=1"])
    with pytest.raises(ValueError, match=r"mesh.compiler_options: the compiler rejects them .*xla_nonsense"):
        tpu.check_options(mesh, ["xla_nonsense=1"])


def test_topologies_are_parsed_or_rejected():
    assert tpu.parse_topology("v5e:16x16").chips == 256
    assert tpu.parse_topology("2 x v5e:16x16").chips == 512
    assert tpu.parse_topology("v5p:4x4x4", slices=3).name == "3 x v5p:4x4x4"
    for wrong in ("v5e", "v5e-16", "v9:4x4", "v5e:4by4"):
        with pytest.raises(ValueError, match="is not a topology"):
            tpu.parse_topology(wrong)


@pytest.mark.parametrize(("name", "hosts"), [("v5e:2x2", 1), ("v5e:2x4", 1), ("v6e:2x4", 1), ("v5e:4x4", 4)])
def test_up_to_eight_chips_of_a_plane_have_one_host(name, hosts):
    host.quiet_libtpu(compute=False)
    assert len({device.process_index for device in tpu.parse_topology(name).devices()}) == hosts


def test_presets_split_parameters_over_a_slice_and_rows_over_slices():
    assert sharding.PRESETS["v5e-16"] == MeshConfig(data=1, fsdp=16)
    assert sharding.PRESETS["v5e-256"] == MeshConfig(data=16, fsdp=16)
    assert sharding.PRESETS["2 x v5e-256"] == MeshConfig(data=32, fsdp=16)
    assert sharding.PRESETS["v5p-64"] == MeshConfig(data=1, fsdp=64)
    sizes_of = lambda config: tuple(sharding.make_mesh(config).devices.shape)  # data, fsdp, expert, tensor
    assert sizes_of(MeshConfig(preset="host")) == (1, 8, 1, 1)
    assert sizes_of(MeshConfig(preset="host", expert=2)) == (1, 4, 2, 1)
    assert sizes_of(MeshConfig(preset="auto", expert=2)) == (1, 4, 2, 1)
    assert sizes_of(MeshConfig(fsdp=4, expert=2)) == (1, 4, 2, 1)
    with pytest.raises(ValueError, match="it must be auto or one of chip"):
        sharding.make_mesh(MeshConfig(preset="v5e-17"))


@pytest.mark.parametrize(
    ("mesh", "experts", "spec", "gathered"),
    [
        (MeshConfig(fsdp=8), 16, P(None, "fsdp"), (1, ("fsdp",))),
        (MeshConfig(fsdp=8), 4, P(None, None, "fsdp"), (2, ("fsdp",))),
        (MeshConfig(fsdp=2, expert=4), 16, P(None, ("expert", "fsdp")), (1, ("fsdp",))),
        (MeshConfig(fsdp=2, expert=4), 4, P(None, "expert", "fsdp"), (2, ("fsdp",))),
        (MeshConfig(fsdp=1, expert=8), 8, P(None, "expert"), (0, ())),
        (MeshConfig(fsdp=2, expert=2, tensor=2), 4, P(None, ("expert", "fsdp"), None, "tensor"), (1, ("fsdp",))),
    ],
)
def test_experts_are_split_over_devices_and_gathered_over_fsdp(mesh, experts, spec, gathered):
    name = "layers/expert_up/kernel"
    found = sharding.param_sharder(sharding.make_mesh(mesh))(name, (3, experts, 64, 32)).spec
    strip = lambda spec: P(*(axes[0] if isinstance(axes, tuple) and len(axes) == 1 else axes for axes in spec))
    assert tuple(strip(found)) == tuple(spec) + (None,) * (4 - len(spec))
    assert sharding.features_of(name, found) == gathered
    rows = sharding.param_sharder(sharding.make_mesh(mesh))("layers/q/kernel", (3, 64, 32)).spec
    assert sharding.axes_of(rows, 1) == tuple(a for a in ("fsdp", "expert") if getattr(mesh, a) > 1)


def test_meshes_that_do_not_fit_the_devices_are_rejected():
    with pytest.raises(ValueError, match="does not cover the 8 devices"):
        sharding.make_mesh(MeshConfig(data=3, fsdp=2))
    with pytest.raises(ValueError, match=r"sampling\.tensor is 3"):
        sharding.sampling_mesh(3)


@pytest.mark.parametrize("stages", [(2, 4), (4, 2), (2, 2, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_reduce_scatter_in_stages_equals_a_single_one(stages, axis):
    x = np.random.default_rng(0).integers(-9, 9, (8, 16, 24)).astype(np.float32)
    mesh = sharding.make_mesh(MeshConfig(fsdp=-1))
    out = P(*[None] * axis, "fsdp")

    def scattered(scatter):
        run = jax.shard_map(lambda x: scatter(x[0]), mesh=mesh, in_specs=P("fsdp"), out_specs=out, check_vma=False)
        return np.asarray(jax.jit(run)(x))

    at_once = scattered(lambda x: lax.psum_scatter(x, "fsdp", scatter_dimension=axis, tiled=True))
    np.testing.assert_array_equal(at_once, x.sum(0))
    np.testing.assert_array_equal(scattered(lambda x: collectives._sum_scattered(x, axis, stages)), at_once)


def places(*coords):
    return [SimpleNamespace(coords=c) for c in coords]


def test_an_axis_of_devices_fills_lines_of_the_torus():
    by_row = [(x, y, 0) for x in range(2) for y in range(3)]
    assert tpu.lines(places(*by_row)) == (2, 3)
    assert tpu.lines(places(*sorted(by_row, key=lambda c: c[1]))) == (3, 2)
    assert tpu.lines(places(*by_row[:3])) == (3,)
    assert tpu.lines(places((1, 1, 0))) == (1,)
    ring = [(0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 0)]  # no two of its neighbours fill a line in order
    assert tpu.lines(places(*ring)) == (4,)


def test_an_axis_over_a_whole_slice_is_in_the_order_of_coordinates():
    devices_of_slice = lambda s: [
        SimpleNamespace(slice_index=s, coords=(x, y, 0), device_kind="TPU v5 lite") for y in range(4) for x in range(4)
    ]
    mesh = tpu.arrange(devices_of_slice(1) + devices_of_slice(0), (2, 16, 1), slices=2)
    assert [d.slice_index for d in mesh[:, 0, 0]] == [0, 1]
    for row in mesh:
        assert tpu.lines(row[:, 0]) == (4, 4)
