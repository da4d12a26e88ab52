"""Which videos a training takes: the paper's thresholds (section 6), and what it leaves open.

    python scripts/curate.py --config configs/curation.py --videos videos/ --out curated
    python scripts/curate.py --config configs/curation.py --videos videos/ --out curated \
        --config.features.weights=/weights/curation \
        --config.caption.endpoint=http://127.0.0.1:8000/v1 --config.caption.model=Qwen/Qwen2.5-VL-7B-Instruct

Hardware: any CPU; the vision models of `features` take one accelerator where there is one. Open curated/report.html.
Thresholds may be changed at any time: what was measured is kept, and only the decision is made again. docs/curation.md
says what each stage measures; `--explain` lists every field, also those that are not named here.
"""

from avd_jax.curation.settings import default_config


def get_config():
    """Return the paper's settings, which are the defaults; those that are most often changed stand here."""
    config = default_config()

    # What a clip is. As the model that is trained takes it; then also `scripts/encode.py --frames --fps`.
    config.analysis.frames = 81  # 4n + 1
    config.analysis.fps = 16.0
    config.analysis.clips_per_scene = 0  # 0: as many as fit between two cuts, back to back

    # Thresholds, in the order in which they are applied. Of the paper: all but the last two, which it does not name.
    config.select.width = 1280
    config.select.height = 720
    config.select.colour = 0.60
    config.select.sharpness = 20.0
    config.select.motion = 0.2
    config.select.temporal_consistency = 0.5  # the best half of those left; 1 keeps all
    config.select.aesthetics = 0.5  # the best half of these
    config.select.duplicate_bits = 8.0  # of 64, mean over 8 frames; copies in another encoding differ in 0 to 4
    config.select.duplicate_cosine = 0.95  # between CLIP embeddings, if there are some

    # Folder with CLIP, DINO and the aesthetic head. Empty: temporal_consistency and aesthetics are skipped.
    config.features.weights = ""

    # A server that speaks OpenAI's protocol (vLLM, Ollama, a provider). Empty: clips stay without captions.
    config.caption.endpoint = ""
    config.caption.model = ""
    config.caption.api_key_env = "CAPTION_API_KEY"  # the name of the variable; the key itself is written nowhere
    config.caption.send = "video"  # "images" for servers that know no video
    config.caption.held_out = ""  # lists of prompts to judge by, such as VBench_full_info.json: no clip is like them
    return config
