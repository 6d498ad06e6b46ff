"""Where devices stand in the mesh: neighbours on the fast axes never lie in two slices."""

import dataclasses
import importlib.util
import itertools
import os

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from llm.config import MeshConfig
from llm.errors import UsageError
from llm.model.placement import network_groups
from llm.model.sharding import MESH_AXES, make_mesh

FAST = ("expert", "tensor", "context")
needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs libtpu, extra 'plan'"
)


@dataclasses.dataclass(frozen=True)
class Fake:
    """What placing looks at in a device; slice_index None: it has none."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100"
    client: None = None


def machines(count, gpus=8, *, numbered=True):
    """GPUs of several machines, one process each, in an order that tells nothing."""
    both = list(itertools.product(range(count), range(gpus)))
    devices = [Fake(gpus * m + g, m, m if numbered else None) for m, g in both]
    return [devices[place] for place in np.random.default_rng(0).permutation(len(devices))]


def groups_along(mesh, axis, attribute="slice_index"):
    """The group numbers met on each line of devices along an axis."""
    numbers = np.vectorize(lambda device: getattr(device, attribute))(mesh.devices)
    return np.moveaxis(numbers, MESH_AXES.index(axis), -1).reshape(-1, mesh.shape[axis])


def crossed(mesh, attribute="slice_index"):
    """How many groups each axis goes over; each line along it meets each as often."""
    found = {}
    for axis in MESH_AXES:
        lines = groups_along(mesh, axis, attribute)
        counts = {tuple(np.unique(line, return_counts=True)[1]) for line in lines}
        assert len(counts) == 1 and len(set(*counts)) == 1, axis
        found[axis] = len(*counts)
    return {axis: number for axis, number in found.items() if number > 1}


@pytest.mark.parametrize(
    ("count", "axes", "expected"),
    [
        (4, {"data": 4, "tensor": 8}, {"data": 4}),
        (4, {"data": 8, "fsdp": 2, "tensor": 2}, {"data": 4}),
        (4, {"data": 2, "fsdp": 4, "tensor": 4}, {"data": 2, "fsdp": 2}),
        (4, {"data": 1, "fsdp": 16, "tensor": 2}, {"fsdp": 4}),
        (3, {"data": 1, "fsdp": 3, "expert": 2, "tensor": 2, "context": 2}, {"fsdp": 3}),
        (6, {"data": 4, "fsdp": 6, "expert": 2}, {"data": 2, "fsdp": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("attribute", ["slice_index", "process_index"])
def test_data_goes_over_the_slow_network_first_then_fsdp_and_nothing_else(
    count, axes, expected, attribute
):
    devices = machines(count, numbered=attribute == "slice_index")
    mesh = make_mesh(MeshConfig(**axes), devices)
    assert set(mesh.devices.flat) == set(devices)
    assert crossed(mesh, attribute) == expected


def test_machines_of_one_gpu_each_are_as_far_from_each_other_on_every_axis():
    mesh = make_mesh(MeshConfig(data=1, tensor=4), machines(4, 1))
    assert mesh.shape["tensor"] == 4


@pytest.mark.parametrize(
    ("count", "axes", "message"),
    [
        (2, {"data": 1, "tensor": 16}, r"1 x 1 = 1 .* the 2 slices .* \(slice_index\).*can: 2$"),
        (4, {"data": 2, "fsdp": 1, "tensor": 16}, r"2 x 1 = 2 .* nearest that can: 4$"),
        (3, {"data": 2, "fsdp": 2, "tensor": 6}, r"2 x 2 = 4 .* nearest that can: 3 or 6$"),
    ],
    ids=str,
)
def test_what_would_put_a_fast_axis_on_the_slow_network_is_refused(count, axes, message):
    with pytest.raises(UsageError, match=message):
        make_mesh(MeshConfig(**axes), machines(count))


def test_machines_of_different_sizes_are_refused_with_their_sizes():
    devices = [device for device in machines(2) if device.id != 3]
    with pytest.raises(UsageError, match=r"not of one size: found 7, 8 devices"):
        make_mesh(MeshConfig(data=-1), devices)


def test_cpu_devices_lie_in_their_order_whatever_process_they_are_of():
    devices = [Fake(place, place // 2, None, "cpu", "cpu") for place in range(8)]
    mesh = make_mesh(MeshConfig(data=2, tensor=4), devices)
    assert list(mesh.devices.flat) == devices
    assert list(make_mesh(MeshConfig(data=2, tensor=4)).devices.flat) == jax.devices()


@pytest.fixture(scope="module")
def slices():
    """(topology, number of slices) -> its devices, from the TPU compiler."""
    from jax.experimental import topologies

    from llm.planning import targets

    with pytest.MonkeyPatch.context() as patched:
        environment = dict(os.environ)
        targets.prepare_environment("v5e:2x2", None, environment)
        for name, value in environment.items():
            patched.setenv(name, value)
        yield lambda name, count: list(
            topologies.get_topology_desc(name, platform="tpu", num_slices=count).devices
        )


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "count", "axes", "expected"),
    [
        ("v5e:4x4", 2, {"data": 2, "fsdp": 8, "tensor": 2}, {"data": 2}),
        ("v5p:2x2x2", 4, {"data": 2, "fsdp": 4, "tensor": 4}, {"data": 2, "fsdp": 2}),
    ],
)
def test_tensor_and_context_stay_within_one_slice_of_tpus(slices, name, count, axes, expected):
    mesh = make_mesh(MeshConfig(**axes), slices(name, count))
    assert crossed(mesh) == expected
    # And within it on neighbours of the torus, where two along tensor share a link.
    if mesh.shape["tensor"] == 2:
        for line in np.moveaxis(mesh.devices, MESH_AXES.index("tensor"), -1).reshape(-1, 2):
            one, other = (np.array(device.coords) for device in line)
            assert np.abs(one - other).sum() == 1


@needs_libtpu
def test_one_slice_of_tpus_is_placed_as_jax_places_it(slices):
    devices, sizes = slices("v5p:4x4x4", 1), (4, 16, 1, 1, 1)
    mesh = make_mesh(MeshConfig(data=4, fsdp=16), devices)
    auto = (AxisType.Auto,) * len(sizes)
    assert mesh == jax.make_mesh(sizes, MESH_AXES, auto, devices=devices)


@needs_libtpu
def test_a_side_of_a_torus_may_be_split_over_two_axes(slices):
    """jax.make_mesh refuses 2 x 16 x 2 of 4 x 4 x 4."""
    devices, axes = slices("v5p:4x4x4", 1), {"data": 2, "fsdp": 16, "tensor": 2}
    assert set(make_mesh(MeshConfig(**axes), devices).devices.flat) == set(devices)


def test_groups_are_told_apart_by_what_jax_gives():
    assert network_groups(machines(2))[0] == "slice_index"
    by, groups = network_groups(machines(2, numbered=False))
    assert by == "process_index" and [len(group) for group in groups] == [8, 8]
    assert network_groups(jax.devices()) == ("", [jax.devices()])
