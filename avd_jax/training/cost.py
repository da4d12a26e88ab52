"""What one training cycle costs, counted in forward passes of the transformer on one example.

A backward pass costs two forwards, and one more where remat runs the block's forward again. The student's rollout stops
at a step drawn uniformly, so its cost is an expectation.
"""

from dataclasses import dataclass
from itertools import accumulate
from statistics import mean

HALF_RATE = 0.35  # of a full pass: the 1.3B model with 11 instead of 21 frames of 60x104 (benchmarks/half_rate.py)


@dataclass(frozen=True)
class CycleCost:
    """Forward passes an example: of one generator update, of one fake_score update, and of the whole cycle."""

    generator: float
    fake_score: float
    cycle: float


def fake_score_updates(config) -> int:
    """Return how many updates of fake_score a cycle has; only distribution matching asks for it."""
    return config.fake_score_updates if config.loss.distribution_matching else 0


def cycle_cost(config) -> CycleCost:
    """Count one cycle of `config`: its updates of fake_score and one of the generator."""
    half_rate, steps = config.half_rate.steps, len(config.student.timesteps)
    passes = [HALF_RATE] * half_rate + [1.0] * (steps - half_rate)
    before_stop = mean(accumulate(passes[:-1], initial=0.0))  # the rollout's steps before the sampled one
    at_stop = mean(passes)
    with_gradient = 3 if config.remat == "none" else 4
    generator = 0.0
    if config.loss.distribution_matching or config.loss.temporal:
        generator += before_stop + with_gradient * at_stop
    if config.loss.distribution_matching:
        generator += 1 + 2  # fake_score, and the teacher with and without the prompt
    if config.loss.regression:
        generator += with_gradient * at_stop
    fake_score = before_stop + at_stop + with_gradient
    updates = fake_score_updates(config)
    return CycleCost(generator, fake_score, updates * fake_score + generator)
