"""avd_jax: Adaptive Video Distillation of Wan2.1 into a few-step student, in JAX."""
