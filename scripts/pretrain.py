"""Train a Wan2.1 transformer from scratch, or fine-tune one, by flow matching on encoded videos.

    python scripts/pretrain.py --config configs/tiny_images.py --workdir runs/tiny_images --out runs/tiny_images/weights
    python scripts/pretrain.py --config configs/finetune.py --config.init_from=/weights/Wan2.1-T2V-1.3B \
        --config.data.latents=/data/latents --workdir runs/finetune --out runs/finetune/weights

The same command resumes from the last checkpoint of the workdir. A run, like any other, is also read by
scripts/export.py and scripts/generate.py. `--explain` prints every field of the config.
"""

from pathlib import Path

from avd_jax import command_line
from avd_jax.convert.shipping import write_dit
from avd_jax.convert.video_size import write_video_size
from avd_jax.methods.flow_matching.method import trained_dit
from avd_jax.methods.transformers import latents_infos
from avd_jax.paths import any_path
from avd_jax.training.trainer import train

OUT = command_line.path_flag("out", None, "folder that gets transformer/, the mean weights, once the run is complete")


def pretrain(recipe, config, workdir: Path) -> int:
    """Train and write the result."""
    run = train(recipe, config, workdir)
    if run.status == 0 and OUT.value:
        write_dit(trained_dit(run.method, run.state.networks["generator"].latest), any_path(OUT.value))
        write_video_size(OUT.value, vars(latents_infos(config.data.latents)[0]))
        print(f"wrote {OUT.value}/transformer")
    return run.status


if __name__ == "__main__":
    command_line.run_training(pretrain, method="flow_matching")
