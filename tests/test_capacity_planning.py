"""Which meshes and batch sizes are tried, and which of them is recommended."""

from types import SimpleNamespace

import jax
import ml_collections
import pytest

from avd_jax.capacity import planning
from avd_jax.capacity.compiling import Report
from avd_jax.errors import UserError
from avd_jax.models.attention import check_heads
from avd_jax.parallel.mesh import make_mesh

CONFIG = ml_collections.ConfigDict({"batch_size": 4, "mesh": {"data": 1, "fsdp": -1, "seq": 1}})


def candidates(devices=8):
    devices = jax.devices()[:devices]

    def build(config):
        mesh = make_mesh(**config.mesh, batch_size=config.batch_size, devices=devices)
        check_heads(12, mesh.shape["seq"])
        return SimpleNamespace(batch_size=config.batch_size, mesh=mesh)

    return planning.candidates(CONFIG, devices, build)


def test_planning_tries_what_divides_batch_and_heads():
    found = [(run.batch_size, run.mesh.shape["fsdp"], run.mesh.shape["seq"]) for run in candidates()]
    # 8 devices: seq=8 does not divide 12 heads, fsdp=8 no batch of 4.
    assert found == [(4, 4, 2), (4, 2, 4), (8, 8, 1), (8, 4, 2), (8, 2, 4)]
    with pytest.raises(UserError, match=r"a batch of 4 .* cannot be shared out over data=1 x fsdp=5"):
        list(candidates(devices=5))
    assert CONFIG.batch_size == 4


def test_the_cheapest_that_fits_is_recommended():
    def report(batch, seconds, total):
        numbers = {"argument_gib": 1.0, "temporary_gib": 1.0, "code_mib": 1.0, "flops": 1.0, "limit_gib": 16}
        mesh = {"data": 1, "fsdp": batch, "seq": 2}
        return Report("p", "t", mesh, batch, total_gib=total, fits=total < 16, cycles=1, seconds=seconds, **numbers)

    reports = [report(4, 400, 10), report(8, 640, 15), report(16, 160, 20)]
    assert planning.recommend(reports) == (
        "--config.batch_size=8 --config.mesh.data=1 --config.mesh.fsdp=8 --config.mesh.seq=2"
    )
    assert planning.recommend([report(16, None, 10), *reports]) == planning.recommend(reports), "it has no estimate"
    assert planning.recommend(reports[2:]).startswith("none: the smallest needs 20.0 GiB of 16.00")
