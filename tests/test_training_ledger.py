"""Where a run's time goes: each second is counted once, over several launches, and what is lost is no training."""

import contextlib
import json

import jax
import jax.numpy as jnp
import pytest

from avd_jax.training import ledger
from avd_jax.training.ledger import KINDS, Ledger, in_words, read_lines


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    time = monotonic


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(ledger, "time", clock)
    return clock


def spent(numbers):
    return {kind: numbers[f"time/spent_{kind}"] for kind in KINDS if numbers[f"time/spent_{kind}"]}


def test_each_second_is_counted_once(clock, monkeypatch):
    monkeypatch.setattr(ledger, "_compiled", compiled := [5.0])
    found = Ledger()
    clock.now += 4
    with found.spending("restore"):
        clock.now += 2
    found.turn_to("step")
    for _ in range(2):
        with found.spending("data"):
            clock.now += 1
        clock.now += 10
    compiled[0] += 3  # of these ten seconds
    with found.spending("sample"):
        clock.now += 5
        compiled[0] += 4
        with contextlib.suppress(KeyError), found.spending("save"):
            clock.now += 6
            raise KeyError
    numbers = found.numbers()
    assert spent(numbers) == {"start": 4, "restore": 2, "data": 2, "step": 17, "compile": 7, "sample": 1, "save": 6}
    assert numbers["time/goodput"] == pytest.approx(17 / 39)
    assert in_words(numbers).startswith("43.6% of 0.01 h was training; compiling 17.9%, saving 15.4%, start 10.3%")
    assert spent(found.numbers()) == spent(numbers), "asking changes nothing"


def test_a_later_launch_goes_on_and_what_it_makes_again_was_lost(clock):
    first = Ledger()
    first.turn_to("step")
    lines = []
    for step in (2, 4, 6, 8):
        clock.now += 20
        lines.append({"step": step, "loss/total": 1.0} | first.numbers())
    lines.append({"step": 8, "samples/alignment": 0.5})  # lines of others have no times
    clock.now += 100
    second = Ledger()
    kept = second.goes_on(lines, 5)  # saved between two lines: of the 40 seconds after step 4, three quarters were lost
    clock.now += 7
    numbers = second.numbers()
    assert spent(numbers) == {"step": 50, "lost": 30, "down": 100, "start": 7}
    assert [line["step"] for line in kept] == [2, 4]
    third = Ledger()  # the second one was killed before it logged anything
    third.goes_on(kept, 5)
    assert spent(third.numbers()) == {"step": 50, "lost": 30, "down": 107}
    fourth = Ledger()
    assert [line["step"] for line in fourth.goes_on(lines, 0)] == [0]
    assert spent(fourth.numbers())["lost"] == 80, "nothing was saved"
    old = [{"step": 3, "loss/total": 1.0}]
    fresh = Ledger()
    assert fresh.goes_on(old, 3) == old
    assert spent(fresh.numbers()) == {}, "a run of before there was a ledger"


def test_compiling_is_heard():
    found = Ledger()
    before = ledger._compiled[0]
    jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) * 1.2345)(jnp.ones(3)))
    assert ledger._compiled[0] > before
    assert found.numbers()["time/spent_compile"] > 0


def test_lines_that_a_kill_cut_off_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    path.write_text(json.dumps({"step": 1}) + '\n[1]\n{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
