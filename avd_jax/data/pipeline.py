"""Training batches from encoded sets: endless, shuffled, exactly resumable, the same for any number of hosts.

Records are shuffled globally and anew in each epoch, and each host reads its rows of each global batch. A global batch
is therefore the same, row by row, however many hosts share it. Hosts count batches, so the state of an iterator
(`get_state`) fits every host and every number of hosts.
"""

import os
import sys
from collections.abc import Sequence

import grain
import numpy as np

from avd_jax.data.latents import EncodedSet, pad_prompt_embeds
from avd_jax.errors import UserError

BATCHES_AHEAD = 2  # each read by a thread of its own


def training_batches(
    latents_dir: str | os.PathLike,
    prompts_dir: str | os.PathLike | None,
    *,
    batch_size: int,
    prompt_batches: int,
    seed: int,
    text_len: int,
    rows: Sequence[int] | None = None,
    held_out: int = 0,
) -> grain.DatasetIterator:
    """Iterate over what one cycle of updates needs: a batch of latents, and a batch of prompts for each update.

    Args:
      latents_dir: a `latents` set.
      prompts_dir: a `prompts` set; None takes the captions of the latents set, shuffled on their own.
      batch_size: of all hosts together.
      prompt_batches: batches of prompts that a cycle takes.
      seed: of the order.
      text_len: length to which embeddings are padded with zeros; longer ones are cut.
      rows: of each global batch that this host reads, such as `parallel.hosts.batch_rows` gives; None: all.
      held_out: records of the latents set that are left out, those of `held_out_indices`.

    Returns:
      An iterator, without end, over dicts of bfloat16 arrays with an entry for each of these rows:
        latents: [B F h w C], of clips.
        captions: {"prompt_embeds": [B text_len text_dim]}, what a network is told of these clips.
        prompts: {"prompt_embeds": [B prompt_batches text_len text_dim]}, of the set of prompts; not there if
          prompt_batches is 0.
      `get_state()` gives JSON-compatible values and `set_state(state)` resumes from there exactly; it can be saved
      with `grain.checkpoint.CheckpointSave`.

    Raises:
      UserError: a set cannot be opened, or the two were made with different text encoders.
    """
    latents = EncodedSet(latents_dir, "latents")
    prompts = latents if prompts_dir is None else EncodedSet(prompts_dir, "prompts")
    for field in ("text_dim", "text_encoder"):
        if getattr(prompts.info, field) != getattr(latents.info, field):
            raise UserError(
                f"{prompts_dir}: {field} is {getattr(prompts.info, field)}, that of {latents_dir} is "
                f"{getattr(latents.info, field)}; encode both with the same --weights."
            )
    latents_seed, prompts_seed = np.random.SeedSequence(seed).generate_state(2)

    def join(index: int) -> dict:
        pair = latents_stream[index]
        prompts = [prompts_stream[index * prompt_batches + i]["prompt_embeds"] for i in range(prompt_batches)]
        if pair["latents"].shape != latents.info.latents_shape:
            raise UserError(f"{latents_dir}: {pair['clip_id']} has latents of shape {pair['latents'].shape}.")
        captions = {"prompt_embeds": pad_prompt_embeds(pair["prompt_embeds"], text_len)}
        row = {"latents": pair["latents"], "captions": captions}
        if prompts:
            padded = [pad_prompt_embeds(embeds, text_len) for embeds in prompts]
            row["prompts"] = {"prompt_embeds": np.stack(padded)}
        return row

    latents_stream = _endless(_Without(latents, held_out_indices(len(latents), held_out)), int(latents_seed))
    prompts_stream = _endless(prompts, int(prompts_seed))
    rows = range(batch_size) if rows is None else rows

    def read_row(number: int) -> dict:
        batch, within = divmod(number, len(rows))
        return join(batch * batch_size + rows[within])

    batches = grain.MapDataset.range(sys.maxsize // (max(prompt_batches, 1) * batch_size))
    batches = batches.map(read_row).batch(len(rows))
    # Threads, not worker processes: the state then is one position, and nothing is copied between processes.
    options = grain.ReadOptions(num_threads=BATCHES_AHEAD, prefetch_buffer_size=BATCHES_AHEAD)
    return iter(batches.to_iter_dataset(options))


def held_out_indices(records: int, count: int) -> list[int]:
    """Return `count` numbers of records, spread evenly over a set of so many, which training is not to see.

    Raises:
      UserError: no record would be left.
    """
    if count >= records:
        raise UserError(f"{count} records are to be held out of a set of {records}; hold out fewer.")
    return [(2 * i + 1) * records // (2 * count) for i in range(count)]


class _Without:
    """A set without some of its records."""

    def __init__(self, source: EncodedSet, left_out: list[int]):
        self._source, self._indices = source, np.setdiff1d(np.arange(len(source)), left_out)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[self._indices[index]]


def _endless(source: EncodedSet | _Without, seed: int) -> grain.MapDataset:
    """Return the set's records by position in an endless stream; each epoch has its own order."""
    return grain.MapDataset.source(source).shuffle(seed=seed).repeat()
