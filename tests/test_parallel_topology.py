"""Names of TPU slices, and what is said if libtpu is missing, locked or of another opinion."""

import pytest
from jax.experimental import topologies

from avd_jax.errors import UserError
from avd_jax.parallel.topology import tpu_devices


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e-16", "--topology v5e-16: there is no such slice; there are v5e:2x2, v5e:2x4, v5e:4x4"),
        ("v5e", "there are v5e:2x2"),
        ("v5f:4x4", "name one like v5e:4x4 or v5p:2x2x4, of v4, v5e, v5p, v6e"),
        ("", "name one like v5e:4x4"),
    ],
)
def test_a_name_that_is_none(name, message):
    with pytest.raises(UserError) as error:
        tpu_devices(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("INVALID_ARGUMENT: Topology layout is not divisible", "--topology v5e:3x7: there is no such slice; there are"),
        ("Internal error when accessing libtpu multi-process lockfile.\nRun rm", "libtpu is locked by another process"),
        ("The TPU is already in use by process 7", "libtpu is locked by another process"),
        ("cannot open libtpu.so", 'cannot be loaded (cannot open libtpu.so); pip install "jax[tpu]"'),
    ],
)
def test_what_libtpu_says(monkeypatch, raised, message):
    def fail(*_, **__):
        raise RuntimeError(raised)

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    with pytest.raises(UserError) as error:
        tpu_devices("v5e:3x7")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
