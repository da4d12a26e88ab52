"""What all tests share: eight CPU devices, a compiler that saves its own time, and programs kept between runs.

Set before jax is imported, and inherited by the scripts that tests start.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest

JAXLIB = tuple(int(number) for number in version("jaxlib").split(".")[:2])
XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    # Half the compile time of a training step; programs this small run no slower.
    "--xla_backend_optimization_level=0",
    # One piece for one thread: to cut a program for many, as is usual, costs a fifth of compiling it.
    "--xla_cpu_parallel_codegen_split_count=1",
    # The older emitters compile the same programs in half the time; jaxlib 0.11 has them no more, nor the flag.
    *(["--xla_cpu_use_fusion_emitters=false"] if JAXLIB < (0, 11) else []),
)

flags = os.environ.get("XLA_FLAGS", "").split()
names = {flag.partition("=")[0] for flag in flags}
os.environ["XLA_FLAGS"] = " ".join([*flags, *(flag for flag in XLA_FLAGS if flag.partition("=")[0] not in names)])
gc.set_threshold(200_000, 20, 50)  # tracing makes many objects that live; a tenth of the suite's time went into looking
# The tests' workers, which inherit it, have a core each: two threads a product would wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where in Python each operation was made: a tenth of lowering a program, for errors that name it anyway.
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_collection_finish():
    """Let a full collection, which generation and some tests ask for, look at what tests make, not at every module."""
    gc.freeze()


@pytest.fixture
def cudnn(monkeypatch):
    """JAX's cuDNN attention believes that there is a GPU that has it; it can be traced, not run."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 92_000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)


@pytest.fixture(scope="session")
def bucket_server():
    """A bucket `gs://bucket` on this machine, started with the first test that wants one."""
    for module in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(module, reason='tests of buckets need the extra: pip install -e ".[dev]"')
    from bucket_cases import started

    server = started()
    yield server
    server.close()


@pytest.fixture
def bucket(bucket_server, request):
    """A folder of its own in that bucket; faults end with the test."""
    from avd_jax.paths import any_path

    bucket_server.requests()
    yield any_path(f"gs://bucket/{request.node.name}")
    bucket_server.faults()
