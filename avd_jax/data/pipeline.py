"""Training batches from encoded sets: endless, shuffled, exactly resumable, the same for any number of hosts.

Records are shuffled globally and anew in each epoch, and each host reads its rows of each global batch. A global batch
is therefore the same, row by row, however many hosts share it. Hosts count batches, so the state of an iterator
(`get_state`) fits every host and every number of hosts.

Several sets are mixed as `mixture.py` says. All clips of a batch have one size: the size is drawn for the batch, by the
shares of the sets of that size, and each row's set among those.
"""

import os
from collections.abc import Mapping, Sequence

import grain
import numpy as np

from avd_jax.data.latents import EncodedSet, pad_prompt_embeds
from avd_jax.data.mixture import Interleaved, open_sets, shares
from avd_jax.errors import UserError

BATCHES_AHEAD = 2  # each read by a thread of its own

_SET, _ROWS, _SIZES = range(1, 4)  # what a further seed is for


def training_batches(
    latents: str | os.PathLike,
    prompts: str | os.PathLike | None,
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
      latents: `latents` sets, as `mixture.named_sets` reads them.
      prompts: `prompts` sets; None takes the captions of the latents sets, shuffled on their own.
      batch_size: of all hosts together.
      prompt_batches: batches of prompts that a cycle takes.
      seed: of the order.
      text_len: length to which embeddings are padded with zeros; longer ones are cut.
      rows: of each global batch that this host reads, such as `parallel.hosts.batch_rows` gives; None: all.
      held_out: records of the latents sets that are left out, those of `held_out_indices`.

    Returns:
      An iterator, without end, over dicts of bfloat16 arrays with an entry for each of these rows:
        latents: [B F h w C], of clips, in each batch of one size.
        canvas: [B 0 F h w C], nothing but that size.
        captions: {"prompt_embeds": [B text_len text_dim]}, what a network is told of these clips.
        prompts: {"prompt_embeds": [B prompt_batches text_len text_dim]}, of the sets of prompts; not there if
          prompt_batches is 0.
      `get_state()` gives JSON-compatible values and `set_state(state)` resumes from there exactly; it can be saved
      with `grain.checkpoint.CheckpointSave`.

    Raises:
      UserError: a set cannot be opened, sets that do not go together, or too few clips of a size for a batch of them.
    """
    clip_sets = open_sets(latents, "latents")
    prompt_sets = clip_sets if prompts is None else open_sets(prompts, "prompts")
    for field in ("text_dim", "text_encoder"):
        there, here = getattr(clip_sets[0].info, field), getattr(prompt_sets[0].info, field)
        if here != there:
            raise UserError(
                f"{prompt_sets[0].folder}: {field} is {here}, that of {clip_sets[0].folder} is {there}; encode both "
                "with the same --weights."
            )
    latents_seed, prompts_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
    left_out = held_out_indices([len(one) for one in clip_sets], held_out)
    clips = _Sizes([*map(_Without, clip_sets, left_out)], shares(latents), latents_seed, batch_size)
    texts = _Mixed(dict(enumerate(prompt_sets)), shares(latents if prompts is None else prompts), prompts_seed)

    def join(batch: int, row: int) -> dict:
        clip = clips.read(batch, row)
        captions = {"prompt_embeds": pad_prompt_embeds(clip["prompt_embeds"], text_len)}
        canvas = np.empty((0, *clip["latents"].shape), clip["latents"].dtype)
        found = {"latents": clip["latents"], "canvas": canvas, "captions": captions}
        if prompt_batches:
            first = (batch * batch_size + row) * prompt_batches
            embeds = [texts[first + i]["prompt_embeds"] for i in range(prompt_batches)]
            found["prompts"] = {"prompt_embeds": np.stack([pad_prompt_embeds(one, text_len) for one in embeds])}
        return found

    rows = range(batch_size) if rows is None else rows

    def read_row(number: int) -> dict:
        batch, within = divmod(number, len(rows))
        return join(batch, rows[within])

    # Grain divides their number as a float, which holds whole numbers up to 2**53.
    batches = grain.MapDataset.range(2**53 // (max(prompt_batches, 1) * batch_size))
    batches = batches.map(read_row).batch(len(rows))
    # Threads, not worker processes: the state then is one position, and nothing is copied between processes.
    options = grain.ReadOptions(num_threads=BATCHES_AHEAD, prefetch_buffer_size=BATCHES_AHEAD)
    return iter(batches.to_iter_dataset(options))


def held_out_indices(records: Sequence[int], count: int) -> list[list[int]]:
    """Return `count` numbers of records which training is not to see, spread evenly over sets of so many records.

    Returns:
      For each set the numbers of those of its records.

    Raises:
      UserError: no record of a set would be left.
    """
    total, ends = sum(records), np.cumsum(records)
    if count >= total:
        raise UserError(f"{count} records are to be held out of a set of {total}; hold out fewer.")
    numbers = np.array([(2 * i + 1) * total // (2 * count) for i in range(count)], int)
    found = [
        (numbers[(numbers >= end - length) & (numbers < end)] - (end - length)).tolist()
        for length, end in zip(records, ends, strict=True)
    ]
    for left_out, length in zip(found, records, strict=True):
        if len(left_out) == length:
            raise UserError(f"{count} records are to be held out, all {length} of one set among them; hold out fewer.")
    return found


class _Without:
    """A set without some of its records."""

    def __init__(self, source: EncodedSet, left_out: list[int]):
        self.source, self._indices = source, np.setdiff1d(np.arange(len(source)), left_out)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self.source[self._indices[index]]


class _Mixed:
    """The records of some sets by position in one endless stream, in which each set has its share."""

    def __init__(self, sets: Mapping[int, EncodedSet | _Without], parts: Sequence[float], seed: int):
        """Take some of all sets by their numbers; `parts` are the shares of all."""
        total = sum(parts[number] for number in sets)
        self._order = Interleaved([parts[number] / total for number in sets], _seed(seed, _ROWS, *sets))
        self._streams = [
            _endless(one, seed if number == 0 else _seed(seed, _SET, number)) for number, one in sets.items()
        ]

    def __getitem__(self, index: int) -> dict:
        which, place = self._order[index]
        return self._streams[which][place]


class _Sizes:
    """The rows of batches of which each has clips of one size."""

    def __init__(self, sets: Sequence[_Without], parts: Sequence[float], seed: int, batch_size: int):
        self._batch_size, sizes = batch_size, {}
        for number, one in enumerate(sets):
            sizes.setdefault(one.source.info.latents_shape, {})[number] = one
        for members in sizes.values():
            clips = sum(len(one) for one in members.values())
            if len(sets) > 1 and clips < batch_size:
                info = next(iter(members.values())).source.info
                raise UserError(
                    f"{_folders(members)}: {clips} clips of {info.frames}x{info.height}x{info.width} do not fill a "
                    f"batch of that size; encode more, leave the set out, or set config.batch_size={batch_size} lower"
                )
        self._shapes, self._named = list(sizes), [_folders(members) for members in sizes.values()]
        shared = [sum(parts[number] for number in members) for members in sizes.values()]
        self._order = Interleaved(shared, _seed(seed, _SIZES))
        self._streams = [_Mixed(members, parts, seed) for members in sizes.values()]

    def read(self, batch: int, row: int) -> dict:
        """Return a clip by its row in a batch (UserError if its latents are of another shape than its set's)."""
        which, place = self._order[batch]
        clip = self._streams[which][place * self._batch_size + row]
        if clip["latents"].shape != self._shapes[which]:
            raise UserError(
                f"{self._named[which]}: {clip['clip_id']} has latents of shape {clip['latents'].shape}, others of "
                f"{self._shapes[which]}; encode the set again."
            )
        return clip


def _folders(sets: Mapping[int, _Without]) -> str:
    return " and ".join(str(one.source.folder) for one in sets.values())


def _seed(seed: int, *purpose: int) -> int:
    """Return another seed, for what is drawn beside the order of the first set."""
    return int(np.random.SeedSequence([seed, *purpose]).generate_state(1)[0])


def _endless(source: EncodedSet | _Without, seed: int) -> grain.MapDataset:
    """Return the set's records by position in an endless stream; each epoch has its own order."""
    return grain.MapDataset.source(source).shuffle(seed=seed).repeat()
