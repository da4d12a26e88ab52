"""What the host loop does around a step: logs, speed, traces, samples."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avd_jax.training.loop import Driven, run_steps
from avd_jax.training.metrics import MetricsWriter
from avd_jax.training.workdir import StopSignals


class NoCheckpoints:
    """Remembers which steps were saved."""

    folder, best_metric = "nowhere", ""

    def __init__(self):
        self.saved = []

    def save(self, step, state, meta, metrics):
        self.saved.append((step, int(state.step), meta["step"]))

    def check(self):
        pass

    def wait(self):
        pass

    def check_best_metric(self, metrics):
        pass


class Config(dict):
    """A config of some fields."""

    __getattr__ = dict.__getitem__


def run(workdir, *, first_step=0, dispatched=None, **options):
    """Count from `first_step` to 6; return (exit status, checkpoints, lines of metrics.jsonl)."""
    config = Config(num_steps=6, log_every=2, checkpoint_every=3, max_nonfinite=2)
    count = jax.jit(lambda step: (step + 1, {"loss/total": step * 1.0, "skipped/in_row": jnp.int32(0)}))

    def dispatch(state, step):
        if dispatched is not None:
            dispatched.append(step)
        after, metrics = count(state.step)
        return SimpleNamespace(step=after), metrics

    driven = Driven(
        config=config,
        dispatch=dispatch,
        describe=lambda: {"data": {}},
        summarise=lambda step, metrics: {name: float(value) for name, value in metrics.items()},
        **options,
    )
    checkpoints = NoCheckpoints()
    writer = MetricsWriter(workdir, first_step=first_step, num_steps=6)
    status, state = run_steps(driven, SimpleNamespace(step=np.int32(first_step)), checkpoints, writer, StopSignals())
    writer.close()
    assert int(state.step) == 6
    return status, checkpoints, [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_logs_and_checkpoints_come_at_their_steps(tmp_path):
    status, checkpoints, lines = run(tmp_path)
    assert status == 0
    assert [(line["step"], line["loss/total"]) for line in lines] == [(2, 1), (4, 3), (6, 5)]
    assert checkpoints.saved == [(3, 3, 3), (6, 6, 6), (6, 6, 6)]
    assert all(line["time/steps_per_second"] == pytest.approx(1 / line["time/step_seconds"]) for line in lines)
    assert "time/mfu" not in lines[0]


def test_mfu_is_the_share_of_the_time_at_peak(tmp_path):
    _, _, lines = run(tmp_path, seconds_at_peak=lambda: 1e-6)
    assert all(line["time/mfu"] == pytest.approx(1e-6 / line["time/step_seconds"]) for line in lines)


def test_samples_are_of_the_step_that_they_name(tmp_path):
    seen = []
    run(tmp_path, sample=lambda step, state: seen.append((step, int(state.step))), sample_every=2)
    assert seen == [(2, 2), (4, 4), (6, 6)]


def test_the_last_step_is_sampled_whatever_the_interval(tmp_path):
    seen = []
    run(tmp_path, sample=lambda step, state: seen.append(step), sample_every=4)
    assert seen == [4, 6]


@pytest.mark.parametrize(("first_step", "traced"), [(0, [2, 3, 4]), (2, [3, 4, 5]), (5, [5])])
def test_a_profile_traces_warm_steps_if_there_are_some(tmp_path, monkeypatch, first_step, traced):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, profiler_options: events.append(str(folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    run(tmp_path, first_step=first_step, dispatched=events, profile=tmp_path / "profile")
    start, stop = events.index(str(tmp_path / "profile")), events.index("stop")
    assert events[start + 1 : stop] == traced


def test_a_profile_is_written(tmp_path):
    run(tmp_path, profile=tmp_path / "profile")
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
