"""What loading a transformer costs, from a disk and from a bucket: bytes, requests, seconds, peak memory of each host.

    python benchmarks/bucket_reads.py --layers 30            # the 1.3B model, 5.7 GB: needs 20 GB of memory and of disk

Two processes stand for two hosts with four devices each, over which `fsdp` cuts every parameter, so that a host holds
half of the model. The bucket is the tests' emulator, on this machine; it needs the extra `dev`.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
HOSTS, DEVICES = 2, 4


def write(folder: str, layers: int) -> None:
    """Write a transformer of random weights in our own layout and, beside it, as Wan has it."""
    import numpy as np

    from avd_jax import convert
    from avd_jax.convert.architectures import WAN_DIT
    from avd_jax.models.wan_dit import WanDiTConfig
    from avd_jax.paths import any_path

    class Random:
        architecture, config, files = WAN_DIT, WanDiTConfig(num_layers=layers), ()
        leaves = WAN_DIT.leaves(config)

        def array(self, path, dtype=None):
            return np.random.default_rng(len(path)).standard_normal(self.leaves[path].shape, np.float32)

    convert.save_orbax(Random(), any_path(folder) / "own" / "transformer")
    convert.export_dit(any_path(folder) / "own", any_path(folder) / "native", layout="native")


def read(folder: str, coordinator: str, index: int) -> None:
    """Load it as one of the hosts, and print what it took."""
    import jax
    from flax import nnx

    from avd_jax import convert
    from avd_jax.parallel.mesh import make_mesh
    from avd_jax.parallel.rules import spec_for

    jax.distributed.initialize(coordinator, HOSTS, index)
    mesh = make_mesh(data=1, fsdp=HOSTS * DEVICES, seq=1)
    before, started = _peak(), time.monotonic()
    dit = convert.load_dit(folder, sharding=lambda path, shape: jax.NamedSharding(mesh, spec_for(path, shape, mesh)))
    jax.block_until_ready(nnx.state(dit))
    print(json.dumps({"seconds": time.monotonic() - started, "peak": _peak(), "before": before}), flush=True)
    os._exit(0)


def _peak() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 2**20 for line in status if line.startswith("VmHWM"))


def main() -> None:
    """Write once, read from everywhere, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    layers = parser.parse_args().layers
    from bucket_cases import BucketServer

    server = BucketServer()
    environment = {
        **os.environ,
        **server.environment,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    with tempfile.TemporaryDirectory() as disk:
        for folder in (disk, "gs://bucket/weights"):
            subprocess.run([sys.executable, __file__, "write", folder, str(layers)], env=environment, check=True)
        total = sum(file.stat().st_size for file in Path(disk, "own").rglob("*") if file.is_file()) / 1e9
        print(f"{layers} layers, {total:.2f} GB; GB read by both hosts, requests, seconds, GiB of a host at its peak")
        for layout in ("own", "native"):
            for folder in (disk, "gs://bucket/weights"):
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    coordinator = f"127.0.0.1:{free.getsockname()[1]}"
                server.requests()
                command = [sys.executable, __file__, "read", f"{folder}/{layout}", coordinator]
                hosts = [
                    subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True)
                    for i in range(HOSTS)
                ]
                said = [json.loads(host.communicate()[0].splitlines()[-1]) for host in hosts]
                asked = server.requests()
                print(
                    f"{layout:7s} {'disk' if folder == disk else 'bucket':7s}"
                    f" {sum(_answered(server, *request) for request in asked) / 1e9:6.2f} {len(asked):5d}"
                    f" {max(host['seconds'] for host in said):7.1f} {max(host['peak'] for host in said):6.2f}"
                    f" ({said[0]['before']:.2f} before)",
                    flush=True,
                )
    server.close()


def _answered(server, path: str, _sent: int, part: str) -> int:
    """Return the bytes of the answer to a request for contents: of the range, or of the object."""
    if "alt=media" not in path:
        return 0
    start, dash, stop = part.removeprefix("bytes=").partition("-")
    if dash and start and stop:
        return int(stop) - int(start) + 1
    return 0  # small files are read whole


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(sys.argv[2], int(sys.argv[3]))
    elif sys.argv[1:2] == ["read"]:
        read(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
