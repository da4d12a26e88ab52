"""UniPC (Zhao et al. 2023, arXiv 2302.04867), second order, as Wan2.1 samples with it (wan/utils/fm_solvers_unipc.py).

Let alpha = 1 - sigma, lambda = log(alpha / sigma), m the x0 prediction, h = lambda_t - lambda_s and E = exp(-h) - 1. A
step from s to t is in the data-prediction form with B(h) = E ("bh2")

    x_t = sigma_t / sigma_s x_s - alpha_t E m_s - alpha_t E sum_j rho_j (m_j - m_s) / r_j,
    r_j = (lambda_j - lambda_s) / h.

The sum runs over earlier predictions and, in the corrector, over the new one at t (r = 1). The predictor takes
rho = 1/2; the corrector solves for the rho that match the Taylor expansion (1/2 at first order). Each step is: predict
x0 at the predicted sample, correct that sample with it, predict the next. The first step has no history and the last
goes to sigma = 0, so both predictors are of first order there.

All of this is linear in the samples and predictions. So the coefficients are a table, made in NumPy float64, with a
zero if a step has no such term. The sampler is one `lax.scan` over its rows, which traces the network once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from avd_jax.diffusion.flow import NUM_TRAIN_TIMESTEPS, at_least_float32, shifted_sigma, x0_from_velocity
from avd_jax.errors import UserError
from avd_jax.shapes import Latents, typechecked


def unipc_schedule(num_steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Return Wan's timesteps and noise levels for a number of steps.

    Wan's table of noise levels ends one training step short of pure noise: sigma starts at 0.9998, not 1, for a shift
    of 5. Its timesteps are cut to whole numbers: the network is told 999. Both are kept.

    Args:
      num_steps: network evaluations (pairs of them under guidance), at least 1.
      shift: timestep shift, above 0.

    Returns:
      timesteps [num_steps] int64 and sigmas [num_steps + 1] float32, the last one 0.

    Raises:
      UserError: for a num_steps below 1 or a shift that is not positive.
    """
    if num_steps < 1:
        raise UserError(f"num_steps is {num_steps}: give at least 1")
    if not shift > 0:
        raise UserError(f"shift is {shift}: give a number above 0")
    # Wan keeps the table in float32 and reads its maximum from there; whole-number timesteps depend on it.
    start = float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS))
    sigmas = shifted_sigma(np.linspace(start, 0.0, num_steps + 1), shift)
    timesteps = (NUM_TRAIN_TIMESTEPS * sigmas[:-1]).astype(np.int64)
    return timesteps, sigmas.astype(np.float32)


@typechecked
def unipc_sample(velocity_fn: Callable, noise: Latents, *, num_steps: int, shift: float | int) -> Latents:
    """Solve the flow from noise to data.

    Args:
      velocity_fn: (latents [B F H W C], timesteps [B] float32) -> velocity [B F H W C], guidance included; traced once.
      noise: [B F H W C], standard normal.
      num_steps: steps, 50 for Wan's published samples.
      shift: timestep shift, 5.0 for Wan2.1 at 480p and 720p text to video (3.0 is Wan's advice for 480p images).

    Returns:
      latents [B F H W C] in float32 at least.

    Raises:
      UserError: see `unipc_schedule`.
    """
    solver = UniPC(num_steps, shift)
    start = solver.start(noise)
    timesteps, *rest = solver.rows
    rows = jnp.asarray(timesteps, jnp.float32), *(jnp.asarray(row, start[0].dtype) for row in rest)
    return jax.lax.scan(lambda carry, row: (solver.step(velocity_fn, carry, row), None), start, rows)[0][0]


class UniPC:
    """The solver step by step, for those who do something in between.

    Attributes:
      rows: what the steps take, a tuple of NumPy arrays with an entry for each step.
    """

    def __init__(self, num_steps: int, shift: float | int):
        """Make the table; arguments and errors are those of `unipc_schedule`."""
        timesteps, sigmas = unipc_schedule(num_steps, shift)
        corrector, predictor = _coefficients(sigmas.astype(np.float64))
        self.rows = timesteps, sigmas[:-1], corrector, predictor

    def start(self, noise: Latents) -> tuple[Latents, Latents, Latents, Latents]:
        """Return what the first step starts from, given noise [B F H W C]; entry 0 is the latents, after each step."""
        x = at_least_float32(noise)
        nothing = jnp.zeros_like(x)
        return x, x, nothing, nothing

    def step(self, velocity_fn: Callable, carry: tuple, row: tuple) -> tuple:
        """Make a step: `carry` as `start` makes it, `row` the step's entries of `rows`."""
        predicted, corrected, older, previous = carry
        timestep, sigma, correct, predict = row
        batch = predicted.shape[:1]
        velocity = velocity_fn(predicted, jnp.full(batch, timestep))
        current = x0_from_velocity(xt=predicted, velocity=velocity, sigmas=jnp.full(batch, sigma))
        corrected = correct[0] * corrected + correct[1] * older + correct[2] * previous + correct[3] * current
        predicted = predict[0] * corrected + predict[1] * previous + predict[2] * current
        return predicted, corrected, previous, current


def _coefficients(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what each step multiplies its terms by, for noise levels [N + 1] that end in 0.

    Returns:
      corrector [N 4]: of the last corrected sample, and the x0 predictions of two steps ago, one step ago and now;
      predictor [N 3]: of the corrected sample, and the x0 predictions of one step ago and now.
    """
    num_steps = len(sigmas) - 1
    alphas = 1 - sigmas
    lambdas = np.log(alphas[:-1] / sigmas[:-1])  # infinite at sigma = 0, which no formula below uses
    corrector, predictor = np.zeros((num_steps, 4)), np.zeros((num_steps, 3))

    corrector[0, 0] = 1.0  # nothing to correct with: the scan starts with the noise as the last corrected sample
    for t in range(1, num_steps):
        s = t - 1
        gain = -alphas[t] * np.expm1(lambdas[s] - lambdas[t])
        h = lambdas[t] - lambdas[s]
        if t == 1:
            per_older, rho_now = 0.0, 0.5
        else:
            ratio = (lambdas[s - 1] - lambdas[s]) / h
            rho_older, rho_now = _corrector_weights(h, ratio)
            per_older = rho_older / ratio
        corrector[t] = sigmas[t] / sigmas[s], gain * per_older, gain * (1 - per_older - rho_now), gain * rho_now

    for s in range(num_steps - 1):
        t = s + 1
        gain = -alphas[t] * np.expm1(lambdas[s] - lambdas[t])
        per_previous = 0.0 if s == 0 else 0.5 * (lambdas[t] - lambdas[s]) / (lambdas[s - 1] - lambdas[s])
        predictor[s] = sigmas[t] / sigmas[s], gain * per_previous, gain * (1 - per_previous)
    predictor[-1, 2] = 1.0  # at sigma = 0 the first-order step is its x0 prediction
    return corrector, predictor


def _corrector_weights(h: float, ratio: float) -> tuple[float, float]:
    """Return the rho of the second-order corrector: of the x0 prediction before the step, and of the one after it.

    They solve rho_older + rho_now = b1 and ratio rho_older + rho_now = b2. b1 and b2 are the integrals of
    exp(-(h - z)) z / h and exp(-(h - z)) (z / h)^2 over 0..h, divided by 1 - exp(-h): the shares that a linear and a
    quadratic part of the x0 prediction have in the exact solution.
    """
    e = np.expm1(-h)
    first = e / -h - 1
    b1, b2 = first / e, 2 * (first / -h - 0.5) / e
    rho_older = (b1 - b2) / (1 - ratio)
    return rho_older, b1 - rho_older
