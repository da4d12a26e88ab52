"""A method put together for its mesh: state, programs and their inputs, for running and for compiling ahead of time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import jax
from jax.sharding import Mesh

from avd_jax.capacity.budget import TRAINING, Part, Stage, part_of
from avd_jax.capacity.program import Program
from avd_jax.errors import UserError, closest
from avd_jax.parallel.compiler import compiler_options
from avd_jax.parallel.hosts import BatchRows, batch_rows
from avd_jax.parallel.mesh import batch_sharding, placed, replicated
from avd_jax.training.method import BatchField, Method, Update
from avd_jax.training.state import TrainState, abstract_state, ema_item, init_state
from avd_jax.training.update import Step, fields_of, fields_of_shared, make_shared, make_step, passes_of


@dataclass(frozen=True)
class Call:
    """An update that a cycle makes.

    Attributes:
      update: which.
      step: its compiled program.
      fields: of the batch, that it reads.
      shared: the compiled program of what all its times share, or None.
      shared_fields: of the batch, that this reads.
    """

    update: Update
    step: Step
    fields: tuple[str, ...]
    shared: Callable[..., dict] | None = None
    shared_fields: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields of the batch that either of them reads."""
        return tuple(dict.fromkeys((*self.fields, *self.shared_fields)))


class Assembly:
    """A method, its state's shapes and its compiled updates.

    Attributes:
      method: as given.
      abstract: the state's shapes, dtypes and shardings.
      calls: the updates of a cycle that have something to train, in order; those of a warm-up among them.
      sizes: name -> the fields of a batch of that size; one entry at least.
    """

    def __init__(self, method: Method):
        """Nothing is compiled yet, and no weights are read.

        Raises:
          UserError: no term of the main network's loss has a weight, or a leaf that no sharding rule matches.
        """
        self.method = method
        updates = [update for update in method.updates if update.times and passes_of(update)]
        if method.main not in {update.network for update in updates}:
            raise UserError(
                "config.loss: every term has weight 0, nothing would be trained; set one of "
                + ", ".join(term.name for update in method.updates for term in update.terms)
            )
        self.abstract = abstract_state(method)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

        def call(update: Update) -> Call:
            """Jit an update: the old state's memory is reused, the new one is sharded alike, metrics are global."""
            options = {"compiler_options": compiler_options(method.mesh)}
            step = jax.jit(
                make_step(method, update),
                donate_argnums=0,
                out_shardings=(shardings, replicated(method.mesh)),
                **options,
            )
            if not update.shared:
                return Call(update, step, fields_of(method, update))
            shared = jax.jit(make_shared(method, update), out_shardings=batch_sharding(method.mesh), **options)
            return Call(update, step, fields_of(method, update), shared, fields_of_shared(method, update))

        self.calls = tuple(call(update) for update in updates)
        self.sizes = method.sizes or {"": method.fields}

    @property
    def mesh(self) -> Mesh:
        """The mesh that it runs on."""
        return self.method.mesh

    @cached_property
    def rows(self) -> BatchRows:
        """Those of each global batch that this host reads and holds."""
        return batch_rows(self.method.mesh, self._batch_size)

    @property
    def _batch_size(self) -> int:
        return jax.tree.leaves(_abstract(self.method.fields))[0].shape[0]

    @property
    def lasting(self) -> tuple[Call, ...]:
        """The updates of a cycle once no warm-up is left."""
        return tuple(call for call in self.calls if call.update.ends is None)

    def complete(self, cycle: int) -> bool:
        """Return whether a cycle, counted from 0, makes the lasting updates and no others."""
        return all(call.update.made_in(cycle) == (call.update.ends is None) for call in self.calls)

    def fresh(self) -> dict[str, int]:
        """Return how many batches a cycle takes of each field that is fresh for every update, 0 if nothing reads it.

        Every cycle is given as many, the most that one takes.
        """
        updates = [call.update for call in self.calls]
        starts = {0, *(u.begins for u in updates), *(u.ends for u in updates if u.ends is not None)}

        def taken(name: str, cycle: int) -> int:
            return sum(call.update.batches for call in self.calls if name in call.reads and call.update.made_in(cycle))

        fresh = [name for name, field in self.method.fields.items() if field.fresh]
        return {name: max(taken(name, cycle) for cycle in starts) for name in fresh}

    def cycle(self) -> dict:
        """Return what a run may not change when it resumes: its networks, its updates, and the batches of a cycle."""
        return {
            "networks": sorted(self.method.networks),
            "updates": {call.update.network: call.update.times for call in self.lasting},
            "batches": self.fresh(),
        }

    def init_state(self) -> TrainState:
        """Make the first state, from the parameters that each network starts from."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        loaded = {}  # networks that start from the same weights load them once
        for name, network in self.method.networks.items():
            if network.start not in loaded:
                loaded[network.start] = network.start(shardings.networks[name].params)
        start = {name: loaded[network.start] for name, network in self.method.networks.items()}
        return jax.jit(lambda params: init_state(self.method, params), out_shardings=shardings)(start)

    def load_frozen(self) -> dict:
        """Make the arrays that no update changes, by name."""
        return {name: part.load() for name, part in self.method.frozen.items()}

    def dispatch(self, state: TrainState, frozen: Mapping, batch: Mapping, key: jax.Array, cycle: int):
        """Dispatch one cycle of updates.

        Args:
          state: its memory is reused.
          frozen: from `load_frozen`.
          batch: one cycle's, from `Method.batches`.
          key: the cycle's.
          cycle: its number, from 0 on.

        Returns:
          The state, and the metrics of each call, by the update's name.
        """
        calls = [call for call in self.calls if call.update.made_in(cycle)]
        metrics: dict[str, list] = {call.update.name: [] for call in calls}
        taken = dict.fromkeys(self.fresh(), 0)
        number = 0
        for call in calls:
            shared: dict = {}
            for time in range(call.update.times):
                own = self.method.key_of(key, number)
                if time < call.update.batches:
                    inputs = {name: self._put(batch[name], taken.get(name)) for name in call.reads}
                    taken |= {name: count + 1 for name, count in taken.items() if name in call.reads}
                    if call.shared is not None:
                        shared = call.shared(state, frozen, {name: inputs[name] for name in call.shared_fields}, own)
                given = {name: inputs[name] for name in call.fields}
                given |= {name: values[time] for name, values in shared.items()}
                state, found = call.step(state, frozen, given, own)
                metrics[call.update.name].append(found)
                number += 1
        return state, metrics

    @property
    def largest(self) -> str:
        """The size of which a batch takes most memory."""
        return max(self.sizes, key=lambda size: part_of(size, _abstract(self.sizes[size])).device_gib)

    def size_of(self, batch: Mapping) -> str:
        """Return which of the sizes a batch of `Method.batches` has; this host may hold only some of its rows."""
        read = {name for call in self.calls for name in call.reads} - set(self.fresh())
        return next(
            size
            for size, fields in self.sizes.items()
            if len(self.sizes) == 1 or all(_shapes(fields[name].abstract) == _shapes(batch[name]) for name in read)
        )

    def _put(self, tree, number: int | None):
        """Return a field on the devices: that of one update if each has its own."""
        return jax.tree.map(lambda local: self.rows.put(local if number is None else local[:, number]), tree)

    def program(self, name: str, size: str | None = None) -> Program:
        """Return a program of a run by name, with the shapes and shardings of its arguments.

        Args:
          name: one of `program_names`.
          size: of the batch, for an update; None: the largest.

        Raises:
          UserError: there is none of that name; says which is closest.
        """
        for call in self.calls:
            if name == call.update.program:
                return self._step_program(name, call, size or self.largest)
            if call.shared is not None and name == call.update.shared_program:
                return self._shared_program(name, call, size or self.largest)
        if name not in self.method.programs:
            names = self.program_names()
            raise UserError(
                f"--programs {name}: this config has no such program{closest(name, names)}; it has " + ", ".join(names)
            )
        return self.method.programs[name]()

    def program_names(self) -> list[str]:
        """Return the names of all programs: those of the updates, the last of a cycle first, then the others."""
        return [*self._step_names(), *self.method.programs]

    def _step_names(self) -> tuple[str, ...]:
        return tuple(
            name
            for call in reversed(self.calls)
            for name in (call.update.program, *([call.update.shared_program] if call.shared is not None else []))
        )

    def stages(self) -> tuple[Stage, ...]:
        """Return what runs in turn: the updates, and what the method says of its other programs."""
        return Stage(TRAINING, self._step_names()), *self.method.stages

    def run_programs(self) -> list[str]:
        """Return the names of the programs that the stages run, each once."""
        names = [name for stage in self.stages() for name in stage.programs]
        return [name for name in dict.fromkeys(names) if name in self.program_names()]

    def parts(self) -> list[Part]:
        """Return what lies in memory while a run trains and samples.

        While a run begins there is less: beside state and frozen networks one copy of the parameters, for which an
        update has a gradient.
        """
        found = list(self._state_parts())
        found += [part_of(name, part.abstract) for name, part in self.method.frozen.items()]
        # Those of the cycle that runs and of the next one, which the host has dispatched.
        batches = [
            self._abstract_batch(call, self.largest, call.reads)
            for call in self.lasting
            for _ in range(2 * call.update.batches)
        ]
        batches += [self._abstract_shared(call, self.largest) for call in self.lasting for _ in range(2)]
        found.append(part_of("batches", batches))
        # Orbax copies the state to the host, and writes it from there while the run goes on.
        saved = sum(part.device_gib + part.host_gib for part in self._state_parts())
        return [*found, Part("a checkpoint that is written", 0.0, saved)]

    def _state_parts(self) -> Iterator[Part]:
        for name, network in self.abstract.networks.items():
            yield part_of(name, network.params)
            yield part_of(f"{name}_optimizer", network.optimizer)
            if network.ema is not None:
                yield part_of(ema_item(name), network.ema)

    def _step_program(self, name: str, call: Call, size: str) -> Program:
        shared = {name: values[0] for name, values in self._abstract_shared(call, size).items()}
        args = self._abstract_inputs(self._abstract_batch(call, size, call.fields) | shared)
        return Program(name, call.step, args, outcomes=_outcomes(call.update), resident=(0, 1))

    def _shared_program(self, name: str, call: Call, size: str) -> Program:
        args = self._abstract_inputs(self._abstract_batch(call, size, call.shared_fields))
        return Program(name, call.shared, args, resident=(0, 1))

    def _abstract_inputs(self, batch: dict) -> tuple:
        frozen = {name: part.abstract for name, part in self.method.frozen.items()}
        key = jax.eval_shape(lambda: jax.random.key(0))  # placed by the program, as a run's; else it is traced twice
        return self.abstract, frozen, batch, key

    def _abstract_batch(self, call: Call, size: str, fields: Iterable[str]) -> dict:
        return placed({name: self.sizes[size][name].abstract for name in fields}, batch_sharding(self.method.mesh))

    def _abstract_shared(self, call: Call, size: str) -> dict:
        if call.shared is None:
            return {}
        made = jax.eval_shape(call.shared, *self._shared_program("", call, size).args)
        return placed(made, batch_sharding(self.method.mesh))


def _abstract(fields: Mapping[str, BatchField]) -> list:
    return [field.abstract for field in fields.values()]


def _shapes(tree) -> list[tuple[int, ...]]:
    """Return the shapes of a tree's arrays without the batch."""
    return [leaf.shape[1:] for leaf in jax.tree.leaves(tree)]


def _outcomes(update: Update) -> tuple[dict[str, int], ...]:
    """Return the equally likely values of all draws that decide how much there is to compute."""
    draws = [draw for draw in update.draws if draw.outcomes]
    values: Iterable = product(*(draw.outcomes for draw in draws))
    return tuple({draw.name: value for draw, value in zip(draws, chosen, strict=True)} for chosen in values)
