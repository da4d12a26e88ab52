"""Shape types of the arrays that cross module boundaries, checked while tracing by `@typechecked`.

Channels are last everywhere. Video is in [-1, 1]; latents are normalised with Wan's per-channel mean and standard
deviation; timesteps are float, 0..1000.
"""

import jax
import numpy as np
from beartype import beartype
from jaxtyping import Bool, Float, Int, Real, jaxtyped

Array = jax.Array | np.ndarray  # a NumPy array is as good wherever a JAX array is

Latents = Float[Array, "batch frames height width channels"]
Video = Float[Array, "batch video_frames video_height video_width 3"]
Timesteps = Real[Array, " batch"]
Sigmas = Float[Array, " batch"]
PromptEmbeds = Float[Array, "batch text_length text_dim"]
Tokens = Float[Array, "batch tokens dim"]
Heads = Float[Array, "batch heads tokens head_dim"]
InputIds = Int[Array, "batch text_length"]
AttentionMask = Int[Array, "batch text_length"] | Bool[Array, "batch text_length"]
PerExample = Float[Array, " batch"]
Scalar = Float[Array, ""]

typechecked = jaxtyped(typechecker=beartype)
