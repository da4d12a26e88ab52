"""The text encoder and its tokenizer against transformers, live."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel
from transformers import UMT5Config as TransformersConfig
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from avd_jax import convert
from avd_jax.data.tokenizer import Tokenizer, clean
from avd_jax.models.umt5 import relative_position_buckets

FIXTURES = Path(__file__).parents[1] / "fixtures"
SIZES = {
    "tiny": {"vocab_size": 100, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2},
    "inner width is not the model's": {
        "vocab_size": 64, "d_model": 40, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 3,
    },
    "other buckets": {
        "vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
        "relative_attention_num_buckets": 16, "relative_attention_max_distance": 50, "layer_norm_epsilon": 1e-3,
    },
    "XXL heads": {"vocab_size": 64, "d_model": 512, "d_kv": 64, "d_ff": 640, "num_layers": 2, "num_heads": 8},
}  # fmt: skip


def random_encoder(folder, sizes):
    torch.manual_seed(1)
    model = UMT5EncoderModel(TransformersConfig(feed_forward_proj="gated-gelu", **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) / (parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 1))
            if name.endswith("SelfAttention.q.weight"):
                parameter.mul_(sizes["d_kv"] ** -0.5)  # T5 scales here, not the logits; else softmax amplifies rounding
    model.save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text("{}")
    return model


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("lengths", [(512, 1), (37, 200)], ids=str)
def test_embeddings(sizes, lengths, tmp_path):
    theirs = random_encoder(tmp_path, sizes)
    mask = (torch.arange(512)[None] < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, sizes["vocab_size"], mask.shape) * mask
    with torch.no_grad():
        expected = (theirs(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]).numpy()
    ours = convert.load_umt5(tmp_path)(jnp.asarray(ids.numpy(), jnp.int32), jnp.asarray(mask.numpy(), jnp.int32))
    error = np.abs(np.asarray(ours) - expected).max() / np.sqrt(np.mean(expected[mask.bool().numpy()] ** 2))
    assert error < 5e-5, error


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 50), (8, 20), (64, 1000)])
def test_buckets(num_buckets, max_distance):
    config = TransformersConfig(
        d_model=8,
        d_kv=4,
        num_heads=2,
        relative_attention_num_buckets=num_buckets,
        relative_attention_max_distance=max_distance,
    )
    attention = UMT5Attention(config, has_relative_attention_bias=True)
    offsets = torch.arange(1500)[None] - torch.arange(1500)[:, None]
    expected = attention._relative_position_bucket(offsets).numpy()
    ours = relative_position_buckets(1500, num_buckets=num_buckets, max_distance=max_distance)
    np.testing.assert_array_equal(ours, expected)


def test_tokens_of_the_same_file():
    texts = json.loads((FIXTURES / "tokenizer_golden.json").read_text(encoding="utf-8"))["texts"]
    texts += ["</s> within <pad> a text", "\u200bzero\u200bwidth", "word " * 511, "word " * 512]
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(FIXTURES / "tokenizer.json"), pad_token="<pad>")
    expected = theirs(
        [clean(text) for text in texts], padding="max_length", truncation=True, max_length=512, return_tensors="np"
    )
    input_ids, attention_mask = Tokenizer.from_path(FIXTURES)(texts)
    np.testing.assert_array_equal(input_ids, expected["input_ids"])
    np.testing.assert_array_equal(attention_mask, expected["attention_mask"])
