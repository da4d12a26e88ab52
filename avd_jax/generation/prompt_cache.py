"""Embeddings of prompts, kept between calls: one file a text, so that the text encoder need not be loaded for it again.

A folder `CACHE/<key>/` is for embeddings that come out the same to the last bit: the key is a hash of the encoder's
weights (some of their values, and size and time of their files), the tokenizer, the dtype, the kind of device and
JAX's version. A file says which text it is of and holds a hash of its values. One that is damaged, or another text's,
counts as missing and is written anew.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from avd_jax.convert.fingerprint import fingerprint
from avd_jax.convert.weights import Weights
from avd_jax.data.atomic import replacing
from avd_jax.data.latents import BFLOAT16
from avd_jax.paths import state_of, user_cache

# A text encoder that was fine-tuned through low-rank factors may differ in its attention only.
TELLING_LEAF = "blocks.attn.q.kernel"


def default_folder() -> Path:
    """Return where embeddings are kept if the user names no folder: in the cache of the user."""
    return user_cache() / "prompts"


def cache_key(text_encoder: Weights, *, tokenizer: str, dtype: str) -> str:
    """Return the name of what makes the same embeddings: weights, fingerprint of a tokenizer, dtype, device, JAX."""
    device = jax.local_devices()[0].device_kind
    # A fingerprint reads some of the values. A file that was written anew, whatever changed in it, is another one.
    stamps = [state_of(file) for file in text_encoder.files]
    told = [fingerprint(text_encoder, TELLING_LEAF), stamps, tokenizer, dtype, device, jax.__version__]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


class PromptCache:
    """Embeddings of texts, in a folder that is made when the first is kept.

    Args:
      folder: of all caches.
      key: from `cache_key`.
    """

    def __init__(self, folder: Path, key: str):
        self._folder = folder / key

    def get(self, text: str) -> np.ndarray | None:
        """Return the embeddings of a text's own tokens, bfloat16 [L text_dim], or None if they are not kept."""
        try:
            with safe_open(self._file(text), "numpy") as file:
                about, embeds = file.metadata(), file.get_tensor("prompt_embeds")
        except (OSError, SafetensorError):
            return None
        return embeds if about == _about(text, embeds) else None

    def keep(self, text: str, embeds: np.ndarray) -> None:
        """Write the embeddings of a text; on a disk that is full or cannot be written none are kept."""
        embeds = np.ascontiguousarray(embeds, BFLOAT16)
        with contextlib.suppress(OSError), replacing(self._file(text)) as temporary:
            temporary.write_bytes(safetensors.numpy.save({"prompt_embeds": embeds}, metadata=_about(text, embeds)))

    def _file(self, text: str) -> Path:
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"


def _about(text: str, embeds: np.ndarray) -> dict[str, str]:
    return {"text": text, "shape": str(embeds.shape), "sha256": hashlib.sha256(embeds.tobytes()).hexdigest()}
