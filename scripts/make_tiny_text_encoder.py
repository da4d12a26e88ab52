"""Make the text side of a tiny model: a tokenizer and a small umT5, trained on the captions of the world of shapes.

    python scripts/make_tiny_text_encoder.py --out weights/tiny

It takes a few minutes on 2 CPU cores. The same command gives the same tokenizer; other versions of JAX give another,
equally good encoder.
"""

import pathlib

import tokenizers
from absl import flags
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from avd_jax import command_line
from avd_jax.convert.saving import write_json
from avd_jax.convert.shipping import write_text_encoder
from avd_jax.data import shapes_world
from avd_jax.data.tokenizer import TOKENIZER_FILE, Tokenizer
from avd_jax.fields import config_from
from avd_jax.methods.text_encoder import RECIPE
from avd_jax.methods.text_encoder.method import accuracy, trained_encoder
from avd_jax.training.trainer import train

OUT = command_line.disk_flag("out", None, "folder that gets tokenizer/ and text_encoder/")
CAPTIONS = flags.DEFINE_integer("captions", 4000, "captions that the tokenizer is trained on", lower_bound=1)
NUM_STEPS = flags.DEFINE_integer("num_steps", 2000, "updates of the encoder", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "of the encoder's weights")
WORKDIR = command_line.disk_flag("workdir", "runs/tiny_text_encoder", "folder of its training, which resumes")

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # their ids are T5's
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'-"]
VOCAB_SIZE = 320


def make_tokenizer(captions: list[str]) -> tokenizers.Tokenizer:
    """Train a lower-case tokenizer that gives each word of the captions a token, spells others and ends with </s>."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=LETTERS, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", end)])
    return tokenizer


def main() -> int:
    """Write both."""
    out = pathlib.any_path(OUT.value)
    serialized = make_tokenizer([shapes_world.caption(i) for i in range(CAPTIONS.value)]).to_str(pretty=True)
    tokenizer = Tokenizer(serialized.encode())
    tokenizer.save(out / "tokenizer")
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(out / "tokenizer" / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})
    config = config_from(RECIPE.fields)
    config.tokenizer, config.seed, config.num_steps = str(out), SEED.value, NUM_STEPS.value
    run = train(RECIPE, config, pathlib.Path(WORKDIR.value))
    if run.status:
        return run.status
    params = run.state.networks["text_encoder"].latest
    write_text_encoder(trained_encoder(run.method, params), out)
    right = accuracy(run.method, params, tokenizer)
    print(f"{out / 'tokenizer' / TOKENIZER_FILE}: {tokenizer.vocab_size} tokens")
    print(f"{out / 'text_encoder'}: its probes answer {right:.1%} of the questions on new captions")
    return 0


if __name__ == "__main__":
    command_line.run(main, required=(OUT,))
