"""The ablation's command line; what it does is tested in `test_experiments_ablation.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--explain"], 0, "seeds of each method of Table 2"),
        (["--config.sedes=1"], 1, "error: config.sedes does not exist (did you mean 'seeds'?)"),
    ],
)
def test_the_fields_are_those_of_the_ablation(flags, status, said):
    command = [sys.executable, "scripts/ablate.py", "--config", "configs/tiny_ablation.py", *flags]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == status
    assert said in found.stdout + found.stderr
    assert "Traceback" not in found.stderr
