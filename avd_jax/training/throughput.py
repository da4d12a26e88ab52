"""How fast a run is against what its devices could do: FLOPs of a cycle over the peak of the matrix units."""

import jax
import jax.numpy as jnp

from avd_jax.capacity.devices import peak_flops
from avd_jax.capacity.flops import jaxpr_flops
from avd_jax.training.cost import fake_score_updates
from avd_jax.training.run import Run


def seconds_at_peak(run: Run) -> float | None:
    """Return the seconds that one cycle of a run would take at the peak of all its devices; None if that is unknown.

    What these are of the seconds that it takes is the run's MFU. The FLOPs are those that are executed, remat included;
    the rollout to a random step counts with its expectation.
    """
    peak = peak_flops(run.mesh.devices.flat[0].device_kind)
    if peak is None:
        return None
    return cycle_flops(run) / (peak * run.mesh.size)


def cycle_flops(run: Run) -> float:
    """Return the FLOPs of one cycle over all devices, expected over the random step of the rollout."""
    config, size, key = run.config, run.config.batch_size, jax.random.key(0)
    rows, text = run.rows.sharding, (run.model_config.text_len, run.model_config.text_dim)
    embeds = jax.ShapeDtypeStruct((size, *text), jnp.bfloat16, sharding=rows)
    latents = jax.ShapeDtypeStruct((size, *run.info.latents_shape), jnp.bfloat16, sharding=rows)
    trips = (len(config.student.timesteps) - 1) / 2

    def flops(step, batch: dict) -> float:
        return jaxpr_flops(step.trace(run.abstract, run.frozen, batch, key).jaxpr, dynamic_trips=trips)

    prompts = {"prompt_embeds": embeds}
    generator = flops(run.generator_step, prompts | {"latents": latents, "caption_embeds": embeds})
    updates = fake_score_updates(config)
    return generator + (updates * flops(run.fake_score_step, prompts) if updates else 0)
