"""Several hosts as one program: how they find each other, what only the first one does, which rows each one reads.

Every host runs the same script over its own devices. `connect` is called before anything touches a device; after it
`jax.devices()` are those of all hosts. Files are written by the first host only.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from avd_jax.errors import UserError
from avd_jax.parallel.mesh import batch_sharding


def connect(*, coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other hosts of this run, if there are any.

    TPU slices, Slurm and Open MPI say themselves who takes part; anywhere else give all three arguments.

    Args:
      coordinator: HOST:PORT of process 0, which all others can reach.
      num_processes: how many take part.
      process_id: the number of this one, from 0.

    Raises:
      UserError: only some of the arguments are given, or the others cannot be reached.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    explicit = len(missing) < len(given)
    if explicit and missing:
        raise UserError(f"{', '.join(missing)} missing: --coordinator, --num_processes and --process_id go together")
    on_tpu = "tpu" in (_platforms() or "")
    if not (explicit or on_tpu or _launched_with_others(os.environ)):
        return
    if explicit and (":" not in coordinator or not 0 <= process_id < num_processes):
        raise UserError(
            f"--coordinator={coordinator} --num_processes={num_processes} --process_id={process_id}: must be HOST:PORT "
            "of process 0, the number of processes, and a number below it"
        )
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, _own_gpus(os.environ))
    except ValueError as error:
        if not on_tpu:  # a TPU host that knows of no others works alone
            raise UserError(
                f"the launcher started several processes but does not say all about them ({error}); pass its variables "
                "on (SLURM_* into a container), or give --coordinator, --num_processes and --process_id"
            ) from error
    except RuntimeError as error:
        raise UserError(
            f"this process could not join the others ({str(error).splitlines()[0][:200]}); start all of them, and give "
            "the same --coordinator, an address of process 0 that the others can reach"
        ) from error


def _platforms() -> str | None:
    """Return what jax may run on; while it is imported, it adds `tpu` on a machine with TPUs and libtpu."""
    return jax.config.jax_platforms


def _launched_with_others(environment: Mapping[str, str]) -> bool:
    """Return whether Slurm (`srun`) or Open MPI (`mpirun`) started more than this process."""
    if "SLURM_PROCID" in environment:
        return int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))) > 1
    return int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def _own_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """Return which of the GPUs that Slurm shows this process are its own; None outside Slurm, or if it shows all.

    JAX takes the one with the number of the process on its node, which is wrong if Slurm shows each process its own
    GPUs only (`--gpus-per-task`), or if a process is to use several.
    """
    if "SLURM_LOCALID" not in environment or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = len([gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu])
    counts = []  # of processes, node by node, from such as "8(x2),4"
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")):
        counts += [int(count)] * int(times or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    if not visible or node >= len(counts):
        return None
    asked = re.search(r"(\d+)$", environment.get("SLURM_GPUS_PER_TASK", ""))  # "2" or "h100:2"
    own = visible < counts[node] or (bool(asked) and int(asked[1]) == visible)
    share = visible if own else visible // counts[node]
    first = 0 if own else int(environment["SLURM_LOCALID"]) * share
    return list(range(first, first + share))


def leaving_at_once(main: Callable[[], int | None]) -> Callable[[], int | None]:
    """Wrap a script's work so that an error on one of several hosts ends this process at once.

    A normal exit would wait for the others, and these for a collective that never comes. Once this process is gone the
    coordination service ends them: at once if it was the first, else after 100 seconds without a sign of life.
    """

    def wrapped() -> int | None:
        try:
            return main()
        except (UserError, SystemExit, KeyboardInterrupt):
            raise  # reported, and left at once, by `report_user_errors`
        except BaseException:
            if jax.process_count() == 1:
                raise
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    return wrapped


def is_first() -> bool:
    """Return whether this host is the one that writes files."""
    return jax.process_index() == 0


def share_of(items: Sequence) -> Sequence:
    """Return this host's share of what all hosts have in the same order; no two get the same, and none is left."""
    return items[jax.process_index() :: jax.process_count()]


def barrier(name: str) -> None:
    """Return once every host has come here."""
    multihost_utils.sync_global_devices(name)


def from_first(value: np.ndarray | bool) -> np.ndarray:
    """Return the first host's value; the shape and dtype are the same on all."""
    return multihost_utils.broadcast_one_to_all(value)


def to_host(array: jax.Array) -> np.ndarray:
    """Return an array whole: one over the devices of all hosts on every host, one of this host's on this one."""
    if array.is_fully_addressable:  # the others may not have it
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@dataclass(frozen=True)
class BatchRows:
    """Which rows of a global batch this host's devices hold, whatever the order of devices in the mesh.

    Attributes:
      sharding: of an array whose leading axis is the global batch.
      batch_size: of all hosts together.
      rows: ascending. Hosts that share tokens hold the same rows.
    """

    sharding: NamedSharding
    batch_size: int
    rows: tuple[int, ...]

    def put(self, local: np.ndarray) -> jax.Array:
        """Return the global batch of which this host has `local`, one entry for each of its rows."""
        place = {row: i for i, row in enumerate(self.rows)}

        def read(index: tuple[slice, ...]) -> np.ndarray:
            return local[[place[row] for row in range(self.batch_size)[index[0]]]]

        return jax.make_array_from_callback((self.batch_size, *local.shape[1:]), self.sharding, read)


def batch_rows(mesh: Mesh, batch_size: int) -> BatchRows:
    """Return the rows of this host; `batch_size` is a multiple of the mesh's batch shards."""
    sharding = batch_sharding(mesh)
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = sorted({row for (part,) in indices for row in range(batch_size)[part]})
    return BatchRows(sharding, batch_size, tuple(rows))
