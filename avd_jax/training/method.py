"""What a method declares: its networks, its updates with their terms, and what a run shows of it.

A method is data and pure functions. Everything that the functions of an update may ask for has a name in one space:

    the parameters of each network, trained or frozen      `generator`
    the extras of the state                                `history`
    the fields of the batch                                `latents`, `captions`
    what is drawn once for the batch                       `stop`
    `keys`                                                 one random key an example, [B]
    the update's own values                                `x0`

A term or value lists the names of its inputs and is called with them as keyword arguments. What an update reads of the
batch, what it computes, logs and costs follows from its terms: a term of weight 0 is not there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import optax
from jax.sharding import Mesh

from avd_jax.capacity.budget import Stage
from avd_jax.capacity.program import Program
from avd_jax.fields import Fields
from avd_jax.models.functional import Params
from avd_jax.training.metrics import MetricsWriter, NoMetrics

Tree = Any  # a pytree of arrays, or of their shapes


def _alone(trained: Params, frozen: Tree) -> Params:
    return trained


@dataclass(frozen=True)
class Trained:
    """A network that updates change.

    Attributes:
      abstract: shapes and dtypes of what is trained of it.
      start: shardings -> the parameters to start from, laid out so; networks with the same `start` share one load.
      optimizer: makes an update of a gradient.
      ema_decay: step -> share of the old that stays in the running mean of the parameters; None keeps no mean.
      frozen: name of the entry of `Method.frozen` that the trained part adds to, such as the weights under an adapter.
      whole: (trained, frozen) -> the parameters that functions see under the network's name.
      optimizer_memory: where the optimizer's state waits between two updates of this network: "device", or "host",
        whose pinned memory it leaves once the gradient is there.
    """

    abstract: Params
    start: Callable[[Tree], Params]
    optimizer: optax.GradientTransformation
    ema_decay: Callable[[jax.Array], float | jax.Array] | None = None
    frozen: str | None = None
    whole: Callable[[Params, Tree], Params] = _alone
    optimizer_memory: str = "device"

    def parameters(self, trained: Params, frozen: Mapping[str, Tree]) -> Params:
        """Return the parameters that functions see, from those that are trained and all that is frozen, by name."""
        return self.whole(trained, frozen.get(self.frozen))


@dataclass(frozen=True)
class Frozen:
    """What no update changes: a network's parameters, or other arrays.

    Attributes:
      abstract: shapes, dtypes and shardings.
      load: makes the arrays, so laid out.
    """

    abstract: Tree
    load: Callable[[], Tree]


@dataclass(frozen=True)
class Value:
    """Something that several terms need, computed once for all of them.

    Attributes:
      name: under which others ask for it.
      inputs: names of what it is made of.
      function: called with the inputs as keyword arguments, returns a pytree.
    """

    name: str
    inputs: tuple[str, ...]
    function: Callable[..., Tree]


@dataclass(frozen=True)
class Term:
    """One summand of a loss.

    Attributes:
      name: of its metric, `loss/<name>`, which is the mean of what the function returns.
      weight: in the sum; 0 switches the term off, and all that it alone needs.
      inputs: names of what it is made of.
      function: called with the inputs as keyword arguments, returns a loss an example, [B], or one for all, a scalar.
      weighted_by: name of a value [B] by which examples count within the term.
    """

    name: str
    weight: float
    inputs: tuple[str, ...]
    function: Callable[..., jax.Array]
    weighted_by: str | None = None


def active(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Return the terms that are not switched off."""
    return tuple(term for term in terms if term.weight)


@dataclass(frozen=True)
class Draw:
    """A number that all examples of an update share: random, or one that follows from the state.

    Attributes:
      name: under which functions ask for it.
      function: (the update's key, the state's extras) -> the number. Stream 1 of the key is the examples'; a draw folds
        in another number.
      outcomes: its equally likely values, if it decides how much there is to compute: the cost is their mean.
    """

    name: str
    function: Callable[[jax.Array, Mapping[str, Tree]], jax.Array]
    outcomes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Made:
    """What the passes of an update made, for its metrics and extras.

    Attributes:
      values: name -> what was computed of `Update.reports` and `Update.watch`, and each active term's losses; an array
        whose first axis is the batch, or a scalar. What belongs to a term that is switched off is not there.
      draws: name -> number drawn.
      examples: in the batch.
    """

    values: Mapping[str, Tree]
    draws: Mapping[str, jax.Array]
    examples: int


@dataclass(frozen=True)
class Update:
    """One update of one network: a gradient step on the sum of its terms.

    Attributes:
      name: of its metrics, `loss/<name>` and `grad_norm/<name>`.
      network: whose parameters it changes.
      terms: of the loss, those of weight 0 included, since their metrics are logged as 0.
      values: what the terms are made of.
      shared: values that the cycle makes once for all `times`, before the first of them, in a program of their own:
        without gradient, of nothing that is drawn. A function returns one tree [B ...] for each time. All times are
        given the same batch.
      watch: values that are only looked at, if what they are made of is computed for a term; no gradient flows.
      reports: names of values that `metrics` and `extras` take.
      draws: what the whole batch shares.
      times: how often it is made in a cycle.
      begins, ends: the cycles that make it: from `begins` on, and before `ends` if that is a number. One that ends is
        of a warm-up, after which another update may train the same network.
      metrics: (what was made, the extras after the update) -> further numbers to log, on the devices.
      extras: (extras, what was made) -> the extras after the update.
    """

    name: str
    network: str
    terms: tuple[Term, ...]
    values: tuple[Value, ...] = ()
    shared: tuple[Value, ...] = ()
    watch: tuple[Value, ...] = ()
    reports: tuple[str, ...] = ()
    draws: tuple[Draw, ...] = ()
    times: int = 1
    begins: int = 0
    ends: int | None = None
    metrics: Callable[[Made, Mapping[str, Tree]], dict[str, jax.Array]] = lambda made, extras: {}
    extras: Callable[[Mapping[str, Tree], Made], Mapping[str, Tree]] = lambda extras, made: extras

    @property
    def program(self) -> str:
        """Its program's name."""
        return f"{self.network}_{'step' if self.ends is None else 'warmup_step'}"

    @property
    def shared_program(self) -> str:
        """The name of the program that makes what its times share."""
        return f"{self.network}_samples"

    @property
    def batches(self) -> int:
        """How many batches a cycle takes for it."""
        return 1 if self.shared else self.times

    def made_in(self, cycle: int) -> bool:
        """Return whether a cycle, counted from 0, makes it."""
        return self.begins <= cycle and (self.ends is None or cycle < self.ends)


@dataclass(frozen=True)
class BatchField:
    """A part of what an update is given.

    Attributes:
      abstract: shapes and dtypes for one update, the global batch first.
      fresh: whether each update of a cycle has its own; `Method.batches` then yields it with an axis for them, after
        the batch's.
    """

    abstract: Tree
    fresh: bool = False


class Batches(Iterator, Protocol):
    """What `Method.batches` returns: an endless iterator over the cycles' batches, with a position."""

    def get_state(self) -> dict:
        """Return the position, as JSON takes it."""

    def set_state(self, state: Mapping) -> None:
        """Go to a position."""


class Observer:
    """What a method watches on the host. This one logs means and samples nothing; methods with more override it."""

    sample_every = 0
    samples_at_start = False
    ratings: Mapping[str, float] = {}  # latest numbers that are not of every step, by which a checkpoint may be rated

    def summarise(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Return the numbers to log of a cycle's metrics, which are on the host: means over each update's calls."""
        return {name: float(value) for name, value in metrics.items()}

    def sample(self, step: int, state) -> None:
        """Show what the state at `step` makes; called every `sample_every` steps, and after the last."""


@dataclass(frozen=True)
class Surroundings:
    """Where an observer writes: the run's folder, and its log."""

    workdir: Path
    writer: MetricsWriter | NoMetrics


@dataclass(frozen=True)
class Method:
    """A method for one config and one mesh. Building it reads sizes and no weights; the callables do the rest.

    Attributes:
      name: of its folder.
      main: the network that the run is for.
      mesh: where it runs.
      networks: those that are trained, by name.
      updates: of a cycle, in order; that of the last one's network completes a step.
      fields: parts of the batch, by name.
      sizes: if batches come in several sizes, each in one of them: name -> `fields` with the shapes of that size. The
        updates are compiled for each; what they read, and what is fresh, is that of `fields`.
      batches: (field -> how many a cycle takes of a fresh one, 0 if none is asked for) -> an iterator over the cycles'
        batches, this host's rows of them.
      frozen: what is not trained, by name.
      extras: what else the state holds, name -> a function that makes its first value.
      accumulation_steps: parts of a batch that are worked on one after another; None: the method has no such setting.
      key_of: (the cycle's key, the number of an update in it) -> the update's key.
      record: what a checkpoint says beside arrays: `architecture` of the main network, and more.
      inputs: config field -> what identifies the weights or the set that its path leads to.
      observer: called with the surroundings and the frozen arrays once a run starts.
      unit: fields -> (name, function, abstract arguments) of the piece of work in which the cost of a cycle is stated,
        for a whole batch of these fields; None states none.
      programs: what else a run compiles, by name, for the memory verdict.
      stages: when these run, beside the updates.
    """

    name: str
    main: str
    mesh: Mesh
    networks: Mapping[str, Trained]
    updates: tuple[Update, ...]
    fields: Mapping[str, BatchField]
    batches: Callable[[Mapping[str, int]], Batches]
    sizes: Mapping[str, Mapping[str, BatchField]] = field(default_factory=dict)
    frozen: Mapping[str, Frozen] = field(default_factory=dict)
    extras: Mapping[str, Callable[[], Tree]] = field(default_factory=dict)
    accumulation_steps: int | None = None
    key_of: Callable[[jax.Array, int], jax.Array] = jax.random.fold_in
    record: Callable[[], dict] = dict
    inputs: Callable[[], dict[str, str]] = dict
    observer: Callable[[Surroundings, Mapping[str, Tree]], Observer] = lambda surroundings, frozen: Observer()
    unit: Callable[[Mapping[str, BatchField]], tuple[str, Callable, tuple]] | None = None
    programs: Mapping[str, Callable[[], Program]] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()

    @property
    def main_network(self) -> Trained:
        """The network that the run is for."""
        return self.networks[self.main]


@dataclass(frozen=True)
class Recipe:
    """A method before it meets a config: what `methods/<name>/__init__.py` exports.

    Attributes:
      name: of the method.
      fields: of its config.
      validate_values: raises a UserError for a value that is not what its field may be, or does not go with the others.
      validate: as `validate_values`, and for weights or data that are not named.
      build: (config, devices, video) -> the method. `devices` None are those that are here; `video`, the size
        `{"frames", "height", "width"}`, stands in for a set that is not there, when nothing but compiling is wanted.
    """

    name: str
    fields: Fields
    validate_values: Callable[[Any], None]
    validate: Callable[[Any], None]
    build: Callable[..., Method]
