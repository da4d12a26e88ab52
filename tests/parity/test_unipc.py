"""UniPC against diffusers' solver, given Wan's schedule (diffusers' own starts elsewhere and keeps fractions)."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from avd_jax.diffusion.unipc import unipc_sample, unipc_schedule

SLOPE, NOISE = np.random.default_rng(0).normal(size=(2, 2, 3, 2, 2, 4)).astype(np.float32)


def diffusers_sample(num_steps, shift, dtype):
    solver = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=2, solver_type="bh2"
    )
    solver.set_timesteps(num_steps)
    timesteps, sigmas = unipc_schedule(num_steps, shift)
    solver.timesteps, solver.sigmas = torch.from_numpy(timesteps), torch.from_numpy(sigmas).to(dtype)
    latents, slope = (torch.from_numpy(x).to(dtype) for x in (NOISE, SLOPE))
    for timestep in solver.timesteps:
        velocity = torch.tanh(latents * slope) + 0.3 * torch.sin(timestep.to(dtype) / 200)
        latents = solver.step(velocity, timestep, latents, return_dict=False)[0]
    return latents.numpy()


def velocity_fn(latents, timesteps):
    return jnp.tanh(latents * SLOPE) + 0.3 * jnp.sin(timesteps / 200)[:, None, None, None, None]


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6, 10, 25, 50])
def test_solver(num_steps, shift):
    expected = diffusers_sample(num_steps, shift, torch.float64)
    sample = np.asarray(unipc_sample(velocity_fn, jnp.asarray(NOISE), num_steps=num_steps, shift=shift))
    error = np.sqrt(np.mean((sample - expected) ** 2) / np.mean(expected**2))
    assert error < 5e-6, error
