"""One process of a small distillation on several, as `test_training_hosts.py` starts it.

python host_worker.py SETTINGS.json COORDINATOR NUM_PROCESSES PROCESS_ID
"""

import json
import os
import sys
from pathlib import Path

import jax
import training_cases
from absl import logging

from avd_jax.errors import report_user_errors
from avd_jax.parallel import hosts
from avd_jax.training import workdir


def keep_stdout_for_python() -> None:
    """Send what native code prints to stderr: Gloo's threads print to stdout, and into each other's lines."""
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)


def main() -> None:
    """Train with the settings of the file, and exit with the status of the run."""
    settings, coordinator, num_processes, process_id = sys.argv[1:]
    logging.set_verbosity(logging.FATAL)
    given = json.loads(Path(settings).read_text())
    workdir.SEEN_WITHIN = 1.0  # both processes are on one disk, or on none
    hosts.connect(coordinator=coordinator, num_processes=int(num_processes), process_id=int(process_id))
    training_cases.use_linear_network(setattr)
    status = training_cases.train(training_cases.make_config(**given["config"]), Path(given["workdir"]))
    jax.distributed.shutdown()
    sys.exit(status)


if __name__ == "__main__":
    keep_stdout_for_python()
    report_user_errors(hosts.leaving_at_once(main))()
