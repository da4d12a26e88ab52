"""Make the golden files of the text encoder and its tokenizer; run in an environment with the `parity` extra.

    python tests/make_umt5_fixture.py

`umt5_golden.npz` holds a tiny random UMT5EncoderModel of transformers, its input and its output. `tokenizer.json` is a
small Unigram tokenizer of the same construction as umT5's, and `tokenizer_golden.json` what sentencepiece, which it was
trained with, makes of some texts.
"""

import html
import io
import json
import re
from pathlib import Path

import ftfy
import numpy as np
import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import UMT5Config, UMT5EncoderModel

FIXTURES = Path(__file__).parent / "fixtures"
SENTENCES = [
    "A red fox runs across a frozen lake while the sun goes down behind the hills.",
    "Two children build a castle of sand near the sea; the waves come closer.",
    "Close-up of a watchmaker's hands, warm light, a slow camera move to the right.",
    "An old tram climbs a steep street in the rain, its windows glowing.",
    "The camera follows a paper boat down a stream, between stones and fallen leaves.",
    "Snow falls on a quiet market square at night; one stall is still open.",
]
TEXTS = [
    *SENTENCES[:2],
    "",
    "   ",
    "  two   spaces \n a line\ttab &amp;amp; an &lt;entity&gt; &#39;twice&#39; ",
    "“curly” quotes, café, ﬁne façade ½ — 100%",
    "broken encoding: cafÃ©",
    "红狐跑过结冰的湖面",
    "🦊 fox 👩‍🚀",
    "control\x07 and\x00 zero",
    "a lone \ud83d surrogate",
    "fox " * 600,
]


def clean(text):
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


def make_tokenizer():
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=trained,
        vocab_size=360,
        model_type="unigram",
        byte_fallback=True,
        normalization_rule_name="nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        hard_vocab_limit=False,
        num_threads=1,
    )
    reference = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())

    vocabulary = [(reference.id_to_piece(i), reference.get_score(i)) for i in range(reference.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(FIXTURES / "tokenizer.json"), pretty=False)

    # Of 512 tokens the last is </s>, also if the text was cut.
    input_ids = [[*reference.encode(clean(text))[:511], 1] for text in TEXTS]
    golden = {"texts": TEXTS, "input_ids": input_ids}
    (FIXTURES / "tokenizer_golden.json").write_text(json.dumps(golden), encoding="utf-8")


def make_encoder():
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=48, d_model=24, d_kv=8, d_ff=40, num_layers=3, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model = UMT5EncoderModel(config).eval()
    with torch.no_grad():
        # Far from the initial values: biases and scales must show in the output.
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) / (parameter.shape[-1] ** 0.5 if parameter.ndim == 2 else 1))
            if name.endswith("SelfAttention.q.weight"):
                parameter.mul_(config.d_kv**-0.5)  # T5 scales here, not the logits; else softmax amplifies rounding
    # More tokens than max_distance, so that all buckets are used.
    input_ids = torch.randint(1, config.vocab_size, (2, 160))
    mask = (torch.arange(160)[None] < torch.tensor([[160], [23]])).long()
    input_ids = input_ids * mask
    with torch.no_grad():
        embeds = model(input_ids=input_ids, attention_mask=mask).last_hidden_state * mask[..., None]
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    weights.pop("encoder.embed_tokens.weight", None)  # the same tensor as shared.weight
    np.savez_compressed(
        FIXTURES / "umt5_golden.npz",
        input_ids=input_ids.numpy().astype(np.int32),
        attention_mask=mask.numpy().astype(np.int32),
        prompt_embeds=embeds.numpy(),
        config_json=json.dumps(config.to_dict(), default=str),
        **{f"weights/{name}": array for name, array in weights.items()},
    )


if __name__ == "__main__":
    make_tokenizer()
    make_encoder()
