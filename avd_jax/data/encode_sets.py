"""Videos and prompts through the VAE and the text encoder into encoded sets (schema in `latents.py`).

Networks see batches of one fixed shape, the last one filled up, so that each compiles once; files are read on threads
while the device works. Text encoder and VAE take turns, a shard each, so that a device need not hold both.
"""

import itertools
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from avd_jax.data import world_clips
from avd_jax.data.atomic import only_writer
from avd_jax.data.encoding import TextEncoder, VideoEncoder
from avd_jax.data.estimate import Estimate, disk_size, size_in_words
from avd_jax.data.inputs import READ_THREADS, Clip
from avd_jax.data.latents import BFLOAT16, LatentsInfo, PromptsInfo, latents_record, prompts_record
from avd_jax.data.prompts import WAN_NEGATIVE_PROMPT
from avd_jax.data.set_finish import WHOLE, Part, Summary
from avd_jax.data.set_writer import SetWriter, input_of
from avd_jax.errors import UserError
from avd_jax.parallel.memory import fitting
from avd_jax.paths import any_path


def encode_videos(
    clips: Sequence[Clip],
    out: str | os.PathLike,
    *,
    vae: VideoEncoder,
    text: TextEncoder,
    frames: int,
    fps: float,
    height: int,
    width: int,
    batch_size: int = 1,
    text_batch_size: int = 8,
    shard_size: int = 64,
    part: Part = WHOLE,
    on_progress: Callable[[int], object] = lambda done: None,
    say: Callable[[str], object] = lambda text: None,
) -> Summary:
    """Encode clips and their captions into a `latents` set; call it again to resume after an interruption.

    With other clips than before it encodes those that were added, see `set_plan.py`.

    Args:
      clips: with different clip_ids.
      out: the set's folder.
      vae: video encoder.
      text: text encoder.
      frames: video frames of every clip.
      fps: frames per second of every clip.
      height: pixels.
      width: pixels.
      batch_size: clips that go through the VAE together.
      text_batch_size: captions that go through the text encoder together.
      shard_size: clips a shard; an interruption loses at most the work of one shard.
      part: of the set, that this machine encodes; another than WHOLE leaves it to `set_finish.merge` to finish it.
      on_progress: called with the number of further clips that are done.
      say: called with what the work will take, once the disk that it needs is known, and once the time.

    Returns:
      How many clips were written, and which were left out and why: those whose `read` raises a UserError, and those
      that give values that are not finite.

    Raises:
      UserError: the folder holds a set of other settings or of no clip in common, or another process writes to it; no
        clip could be encoded; the size does not fit into memory; a full disk.
    """
    negative = _negative_prompt(text, text_batch_size)
    video_shape = jax.ShapeDtypeStruct((batch_size, frames, height, width, 3), jnp.float32)
    info = LatentsInfo(
        text_len=text.text_len,
        text_dim=negative.shape[1],
        text_encoder=text.fingerprint,
        frames=frames,
        height=height,
        width=width,
        fps=fps,
        latents_shape=jax.eval_shape(vae.encode, video_shape).shape[1:],
        vae=vae.fingerprint,
    )
    inputs = [input_of({"clip_id": clip.clip_id, "caption": clip.caption}) for clip in clips]
    hint = "give smaller --frames, --height, --width or --batch_size"
    at_once = fitting(f"clips of {frames}x{height}x{width}, {batch_size} at once", hint)
    with only_writer(any_path(out), _part_name(part)), at_once:
        writer = SetWriter(out, info, inputs, inputs_per_shard=shard_size, part=part)
        pending, todo = _begin(writer, [clip.caption for clip in clips], info, on_progress, say)
        estimate = Estimate(len(todo), lambda text: say(f"{out}: {text}"))
        reads = _read_ahead((clips[i] for i in todo), ahead=READ_THREADS + batch_size)

        def on_batch(count: int) -> None:
            estimate.done(count)
            on_progress(count)

        for shard in pending:
            results = itertools.islice(reads, len(writer.to_encode(shard)))
            skipped: dict[str, str] = {}
            pairs = list(_encode_clips(_without_errors(results, skipped, on_progress), vae, batch_size, on_batch))
            with text.at_work():
                captions = list(_encode_texts(text, [clip.caption for clip, _ in pairs], text_batch_size))
            records = []
            for (clip, latents), embeds in zip(pairs, captions, strict=True):
                if not (np.isfinite(latents).all() and np.isfinite(embeds).all()):
                    skipped[clip.clip_id] = f"{clip.clip_id}: its latents or embeddings are not finite."
                    continue
                about = {"clip_id": clip.clip_id, "caption": clip.caption, "source": clip.source, "fps": fps}
                about |= {"scores": clip.scores}
                records.append(latents_record(**about, latents=latents, prompt_embeds=embeds))
            writer.write_shard(shard, records, skipped)
        return writer.finish(WAN_NEGATIVE_PROMPT, negative)


def encode_prompts(
    prompts: Iterable[str],
    out: str | os.PathLike,
    *,
    text: TextEncoder,
    text_batch_size: int = 8,
    shard_size: int = 64,
    part: Part = WHOLE,
    on_progress: Callable[[int], object] = lambda done: None,
    say: Callable[[str], object] = lambda text: None,
) -> Summary:
    """Encode prompts, each different one once and in their order, into a `prompts` set.

    Arguments, result and errors are those of `encode_videos`; `text_batch_size` prompts are encoded together.
    """
    prompts = list(dict.fromkeys(prompts))
    negative = _negative_prompt(text, text_batch_size)
    info = PromptsInfo(text_len=text.text_len, text_dim=negative.shape[1], text_encoder=text.fingerprint)
    with only_writer(any_path(out), _part_name(part)):
        writer = SetWriter(out, info, prompts, inputs_per_shard=shard_size, part=part)
        pending, _ = _begin(writer, prompts, info, on_progress, say)
        for shard in pending:
            chosen = [prompts[i] for i in writer.to_encode(shard)]
            records, skipped = [], {}
            with text.at_work():
                for prompt, embeds in zip(chosen, _encode_texts(text, chosen, text_batch_size), strict=True):
                    if np.isfinite(embeds).all():
                        records.append(prompts_record(text=prompt, prompt_embeds=embeds))
                    else:
                        skipped[prompt] = f"{prompt!r}: its embeddings are not finite."
                    on_progress(1)
            writer.write_shard(shard, records, skipped)
        return writer.finish(WAN_NEGATIVE_PROMPT, negative)


def encode_shapes_world(
    out: str | os.PathLike,
    *,
    vae: VideoEncoder,
    text: TextEncoder,
    clips: int,
    prompts: int,
    frames: int,
    fps: float,
    height: int,
    width: int,
    batch_size: int = 1,
    text_batch_size: int = 8,
    shard_size: int = 64,
    style: str = "painted",
    part: Part = WHOLE,
    on_progress: Callable[[int], object] = lambda done: None,
    say: Callable[[str], object] = lambda text: None,
) -> dict[Path, Summary]:
    """Encode the built-in world: its first training clips into `out/latents`, later captions into `out/prompts`.

    Args:
      out: the folder of both sets.
      clips: how many clips, 1 at least.
      prompts: how many captions of the clips after these, of which each different one is encoded once; 0: no set.
      style: one of `shapes_world.STYLES`.

    The other arguments are those of `encode_videos`, and both sets are resumed in the same way.

    Returns:
      The folder of each set -> how it came out.

    Raises:
      UserError: one of the folders holds another set, or clips and prompts reach into the held-out ones.
    """
    size = {"frames": frames, "height": height, "width": width}
    shared = {"text": text, "text_batch_size": text_batch_size, "shard_size": shard_size, "part": part}
    shared |= {"on_progress": on_progress, "say": say}
    captions = world_clips.training_prompts(prompts, clips=clips)
    chosen = world_clips.training_clips(clips, **size, style=style)
    latents_dir, prompts_dir = any_path(out) / "latents", any_path(out) / "prompts"
    summaries = {
        latents_dir: encode_videos(chosen, latents_dir, vae=vae, fps=fps, batch_size=batch_size, **size, **shared)
    }
    if captions:
        summaries[prompts_dir] = encode_prompts(captions, prompts_dir, **shared)
    return summaries


def _begin(
    writer: SetWriter, texts: Sequence[str], info: PromptsInfo, on_progress: Callable, say: Callable
) -> tuple[list[int], list[int]]:
    """Return the shards to write and the indices of the inputs to encode for them; say so, and what disk they take."""
    pending = writer.pending()
    todo = [i for shard in pending for i in writer.to_encode(shard)]
    on_progress(len(texts) - len(todo))
    if todo:
        values = math.prod(info.latents_shape) if isinstance(info, LatentsInfo) else 0
        text = {"texts": (texts[i] for i in todo), "text_len": info.text_len, "text_dim": info.text_dim}
        size = disk_size(records=len(todo), values=values, **text)
        say(
            f"{writer.folder}: {len(todo)} of {len(texts)} to encode, about {size_in_words(size)} on disk "
            f"({size_in_words(1000 * size / len(todo))} for 1,000)"
        )
    return pending, todo


def _part_name(part: Part) -> str:
    return "" if part == WHOLE else str(part)


def _read(clip: Clip) -> np.ndarray | UserError:
    try:
        return clip.read()
    except UserError as error:
        return error


def _read_ahead(clips: Iterable[Clip], ahead: int) -> Iterator[tuple[Clip, np.ndarray | UserError]]:
    """Yield (clip, its video or what is wrong with it) in order, while the next `ahead` clips are being read."""
    pool = ThreadPoolExecutor(READ_THREADS)
    waiting: deque = deque()
    try:
        for clip in clips:
            waiting.append((clip, pool.submit(_read, clip)))
            if len(waiting) > ahead:
                first, result = waiting.popleft()
                yield first, result.result()
        for clip, result in waiting:
            yield clip, result.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _without_errors(results: Iterable, skipped: dict[str, str], on_progress: Callable) -> Iterator:
    """Pass on the clips that could be read and note the others in `skipped`."""
    for clip, result in results:
        if isinstance(result, UserError):
            skipped[clip.clip_id] = str(result)
            on_progress(1)
        else:
            yield clip, result


def _encode_clips(
    read: Iterable[tuple[Clip, np.ndarray]], vae: VideoEncoder, batch_size: int, on_progress: Callable
) -> Iterator[tuple[Clip, np.ndarray]]:
    for batch in _batched(read, batch_size):
        videos = np.stack([video for _, video in batch])
        latents = np.asarray(vae.encode(_filled(videos, batch_size)), BFLOAT16)
        yield from zip((clip for clip, _ in batch), latents, strict=False)
        on_progress(len(batch))


def _encode_texts(text: TextEncoder, texts: Sequence[str], batch_size: int) -> Iterator[np.ndarray]:
    for batch in _batched(texts, batch_size):
        yield from text.encode(batch + batch[-1:] * (batch_size - len(batch)))[: len(batch)]


def _negative_prompt(text: TextEncoder, batch_size: int) -> np.ndarray:
    with text.at_work():
        return text.encode([WAN_NEGATIVE_PROMPT] * batch_size)[0]


def _batched(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _filled(array: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last row until there are `size` rows."""
    return array[np.minimum(np.arange(size), len(array) - 1)]
