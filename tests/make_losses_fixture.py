"""Make tests/fixtures/losses_golden.npz and unipc_golden.npz: the paper's formulas, written out in NumPy float64.

Run from the repository root: `python tests/make_losses_fixture.py`. Nothing of avd_jax is imported and every formula
is worked out another way than there if there is one: loops instead of closed forms, and for UniPC the integral of an
interpolating polynomial, by quadrature, instead of coefficients.
"""

from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"
UNIPC_CASES = ((1, 5.0), (2, 5.0), (3, 3.0), (4, 5.0), (7, 8.0), (20, 1.0), (50, 5.0))


def distribution_matching(x0, fake_x0, real_x0):
    gradients, losses = np.zeros_like(x0), np.zeros(len(x0))
    for b in range(len(x0)):
        normaliser = np.abs(x0[b] - real_x0[b]).sum() / x0[b].size
        gradients[b] = (fake_x0[b] - real_x0[b]) / normaliser
        losses[b] = (gradients[b] ** 2).sum() / x0[b].size / 2
    return gradients, losses


def adaptive_weights(losses, index, num_timesteps, alpha, k, weight_uses):
    """One example after another; returns the weights and the history after each example."""
    mean = [0.0] * num_timesteps
    seen = [False] * num_timesteps
    weights, means = [], []
    for loss, t in zip(losses, index, strict=True):
        before = mean[t] if seen[t] else loss
        mean[t] = alpha * before + (1 - alpha) * loss
        seen[t] = True
        compared = {"before": before, "after": mean[t]}[weight_uses]
        weights.append(1 - 1 / (1 + np.exp(-k * (loss - compared))))
        means.append(list(mean))
    return np.array(weights), np.array(means)


def temporal_variance(x):
    squares = (x**2).mean(axis=1) - x.mean(axis=1) ** 2
    return squares.reshape(len(x), -1).mean(axis=1)


def unipc(velocity_fn, noise, num_steps, shift):
    """Wan's UniPC: second order, bh2, x0 prediction, corrector on, first order at both ends."""
    top = float(np.float32(0.999))
    uniform = [top * (1 - i / num_steps) for i in range(num_steps)]
    exact = [shift * u / (1 + (shift - 1) * u) for u in uniform]
    timesteps = [int(1000 * sigma) for sigma in exact]
    sigmas = [float(np.float32(sigma)) for sigma in exact] + [0.0]
    log_snr = [np.log((1 - sigma) / sigma) for sigma in sigmas[:-1]] + [np.inf]

    def advance(x, s, t, predictions):
        """alpha_t times the integral of exp(-(lambda_t - z)) m(z); m interpolates (log_snr, prediction) pairs."""
        nodes, weights = np.polynomial.legendre.leggauss(24)
        h = log_snr[t] - log_snr[s]
        z = log_snr[s] + h * (nodes + 1) / 2
        total = 0
        for i, (at, prediction) in enumerate(predictions):
            basis = np.ones_like(z)
            for j, (other, _) in enumerate(predictions):
                if i != j:
                    basis = basis * (z - other) / (at - other)
            total = total + prediction * (weights * basis * np.exp(-(log_snr[t] - z))).sum() * h / 2
        return sigmas[t] / sigmas[s] * x + (1 - sigmas[t]) * total

    def halved(x, s, t, start, change):
        """Steps that weigh the change over the step with 1/2 instead of its integral: predictor, first corrector."""
        gain = (1 - sigmas[t]) * (1 - np.exp(log_snr[s] - log_snr[t]))
        return sigmas[t] / sigmas[s] * x + gain * (start + change / 2)

    m = []
    x = corrected = noise
    for i in range(num_steps):
        m.append(x - sigmas[i] * velocity_fn(x, timesteps[i]))
        if i == 1:
            corrected = halved(corrected, 0, 1, m[0], m[1] - m[0])
        elif i > 1:
            corrected = advance(corrected, i - 1, i, [(log_snr[j], m[j]) for j in (i - 2, i - 1, i)])
        if i == num_steps - 1:
            return np.array(timesteps), np.array(sigmas), m[i]
        change = 0
        if i > 0:
            change = (m[i] - m[i - 1]) / (log_snr[i] - log_snr[i - 1]) * (log_snr[i + 1] - log_snr[i])
        x = halved(corrected, i, i + 1, m[i], change)
    raise AssertionError("num_steps is at least 1")


def make_losses(rng):
    x0, fake_x0, cond_x0, uncond_x0 = rng.normal(size=(4, 3, 4, 2, 3, 5))
    x0[1] *= 3  # examples of different scale, so that a normaliser over the batch would show
    real_x0 = uncond_x0 + 5.0 * (cond_x0 - uncond_x0)
    gradient, loss = distribution_matching(x0, fake_x0, real_x0)
    losses, index = rng.gamma(2.0, 0.3, size=32), rng.integers(0, 4, size=32)
    data = {
        "x0": x0,
        "fake_x0": fake_x0,
        "cond_x0": cond_x0,
        "uncond_x0": uncond_x0,
        "dmd_gradient": gradient,
        "dmd_loss": loss,
        "temporal_variance": temporal_variance(x0),
        "temporal_loss": -np.log(temporal_variance(x0).mean() + 1e-6),
        "losses": losses,
        "timestep_index": index,
    }
    for weight_uses in ("before", "after"):
        data[f"weights_{weight_uses}"], data["means"] = adaptive_weights(losses, index, 4, 0.95, 3.0, weight_uses)
    for shift in (1.0, 5.0):
        data[f"train_sigmas_{shift}"] = [shift * u / (shift * u + 1 - u) for u in np.linspace(1, 0, 1001)[:-1]]
    return data


def make_unipc(rng):
    noise, slope = rng.normal(size=(2, 2, 2, 2, 3, 4))
    data = {"noise": noise, "slope": slope}
    for steps, shift in UNIPC_CASES:
        timesteps, sigmas, final = unipc(lambda z, t: np.tanh(z * slope) + 0.3 * np.sin(t / 200), noise, steps, shift)
        data |= {
            f"timesteps_{steps}_{shift}": timesteps,
            f"sigmas_{steps}_{shift}": sigmas,
            f"final_{steps}_{shift}": final,
        }
    return data


if __name__ == "__main__":
    np.savez_compressed(FIXTURES / "losses_golden.npz", **make_losses(np.random.default_rng(0)))
    np.savez_compressed(FIXTURES / "unipc_golden.npz", **make_unipc(np.random.default_rng(1)))
