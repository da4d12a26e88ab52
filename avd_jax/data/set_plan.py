"""Which inputs of an encoded set lie in which of its files, also once its list of inputs has changed.

The files of a set are numbered, and a finished one never changes, since a training may be reading it. So a plan is a
list: for each number the places of its inputs in the list of inputs, or None where the file, if there is one, is no
longer part of the set.

- The first plan cuts the list into pieces of the same length. It follows from the list, so it is not stored.
- If the list changes, what was added comes into new files behind the others. A file that holds an input which is no
  longer listed leaves the set; what else it holds is copied into the new files, not encoded again.
"""

import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from avd_jax.data.atomic import write_text
from avd_jax.data.latents import read_json

PLAN_FILE = "plan.json"  # only of sets whose list has changed
Plan = list[Sequence[int] | None]


def first_plan(inputs: int, per_file: int) -> Plan:
    """Return the plan of a new set of so many inputs."""
    return [range(first, min(first + per_file, inputs)) for first in range(0, inputs, per_file)]


def changed_plan(
    inputs: Sequence[str],
    per_file: int,
    finished: Iterable[tuple[int, Collection[str]]],
    copied: Collection[str] = (),
) -> Plan:
    """Return the plan of a set whose list of inputs is another one now.

    Args:
      inputs: the list, of different texts.
      per_file: the most inputs of a new file.
      finished: number of a finished file and its inputs; of two with an input in common the first one stays.
      copied: inputs that need not be encoded if they come into a new file; they come before the others.
    """
    place = {text: index for index, text in enumerate(inputs)}
    plan: dict[int, Sequence[int] | None] = {}
    done: set[str] = set()
    for number, texts in finished:
        stays = all(text in place and text not in done for text in texts)
        plan[number] = [place[text] for text in texts] if stays else None
        done.update(texts if stays else ())
    rest = [index for index, text in enumerate(inputs) if text not in done]
    rest.sort(key=lambda index: inputs[index] not in copied)
    numbers = (number for number in itertools.count() if number not in plan)
    for first in range(0, len(rest), per_file):
        plan[next(numbers)] = rest[first : first + per_file]
    return [plan.get(number) for number in range(max(plan) + 1)]


def save_plan(folder: Path, plan: Plan, inputs_sha256: str, *, owner: str = "") -> None:
    """Store the plan of a changed list, so that all that write to the set, also after a kill, follow the same.

    Args:
      folder: of the set.
      plan: see above.
      inputs_sha256: of the list.
      owner: see `replacing`.
    """
    files = [None if places is None else list(places) for places in plan]
    write_text(folder / PLAN_FILE, json.dumps({"inputs_sha256": inputs_sha256, "files": files}) + "\n", owner=owner)


def stored_plan(folder: Path, metadata: Mapping) -> tuple[Plan, str]:
    """Return the plan of a set, and which list of inputs it is for (`inputs_sha256`).

    Args:
      folder: of the set.
      metadata: what its metadata.json holds.
    """
    path = folder / PLAN_FILE
    if not path.exists():
        return first_plan(metadata["inputs"], metadata["inputs_per_shard"]), metadata["inputs_sha256"]
    stored = read_json(path)
    return stored["files"], stored["inputs_sha256"]
