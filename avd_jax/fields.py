"""Configs made from a table of rows, `dotted name -> Field`: a default, a help line, and what the value may be."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_collections
from absl import flags

from avd_jax.errors import UserError, closest
from avd_jax.paths import any_path, local_path, weights_path

Check = Callable[[object], str | None]
WIDEST = 64  # characters in front of the help of a field, where --explain aligns it


def anything(value: object) -> None:
    """Accept every value of the default's type."""


class Field(NamedTuple):
    """One row of a config.

    Attributes:
      default: also says which type the field has.
      help: one line for `--explain`.
      check: value -> what it must be, as the end of the sentence "config.NAME=VALUE ..."; None if it is that.
      changeable: whether a run may resume with another value. It decides nothing that the run computes, or it is a path
        whose contents are compared instead.
      recorded: whether a run may resume with another value though it decides what the run computes from there on; the
        change is written down with its step.
    """

    default: object
    help: str
    check: Check = anything
    changeable: bool = False
    recorded: bool = False


Fields = Mapping[str, Field]


def at_least(least: int, hint: str = "") -> Check:
    """Return the check of a whole number; `hint` is added to what it says."""
    return lambda value: None if value >= least else f"must be at least {least}{hint}"


def not_negative(value: float) -> str | None:
    """Check a finite number, 0 or above."""
    return None if 0 <= value < math.inf else "must be 0 or a positive number"


def positive(value: float) -> str | None:
    """Check a finite number above 0."""
    return None if 0 < value < math.inf else "must be positive"


def finite(value: float) -> str | None:
    """Check a number that is neither infinite nor nan."""
    return None if math.isfinite(value) else "must be a number"


def not_nan(value: float) -> str | None:
    """Check a number that may be infinite."""
    return "must be a number" if math.isnan(value) else None


def below_one(value: float) -> str | None:
    """Check a decay: at least 0 and below 1."""
    return not_negative(value) or (None if value < 1 else "must be at least 0 and below 1")


def share(value: float) -> str | None:
    """Check a share of a whole."""
    return None if 0 <= value <= 1 else "must be a share, 0 to 1"


def band(value: Sequence[float]) -> str | None:
    """Check two bounds around 1."""
    return None if len(value) == 2 and value[0] < 1 < value[1] else "must be two numbers, below and above 1"


def one_of(choices: Iterable[str]) -> Check:
    """Return the check of a name that is one of `choices`."""
    choices = tuple(choices)

    def check(value: str) -> str | None:
        return None if value in choices else f"must be one of {', '.join(choices)}{closest(value, choices)}"

    return check


def config_from(fields: Fields) -> ml_collections.ConfigDict:
    """Return a config with every field at its default; fields can be set, not added."""
    config = ml_collections.ConfigDict()
    for name, field in fields.items():
        *parents, leaf = name.split(".")
        node = config
        for parent in parents:
            if parent not in node:
                node[parent] = ml_collections.ConfigDict()
            node = node[parent]
        node[leaf] = field.default
    return config.lock()


def with_defaults(fields: Fields, **defaults: object) -> dict[str, Field]:
    """Return a copy of a table in which some fields have other defaults; `__` stands for the dot of a name."""
    changed = {name.replace("__", "."): value for name, value in defaults.items()}
    return dict(fields) | {name: fields[name]._replace(default=value) for name, value in changed.items()}


def flatten(config) -> dict[str, object]:
    """Return dotted field name -> value."""
    flat = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            flat |= {f"{key}.{name}": leaf for name, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def describe(config, fields: Fields) -> str:
    """Return one line a field: name, value, help. A long value moves the help of its own line only."""
    flat = flatten(config)
    width = max((length for name, value in flat.items() if (length := len(f"{name} = {value}")) <= WIDEST), default=0)
    return "\n".join(f"{f'{name} = {value}':<{width}}  {fields[name].help}" for name, value in flat.items())


def check_names(config, fields: Fields) -> dict[str, object]:
    """Return the flat config, having checked that it is one of these fields (UserError names one that is not)."""
    flat = flatten(config)
    for name in flat:
        if name not in fields:
            raise UserError(f"config.{name} does not exist{closest(name, fields)}")
    return flat


def check_values(config, fields: Fields) -> dict[str, object]:
    """Check names and values, each value by the row of its field.

    Returns:
      The flat config.

    Raises:
      UserError: naming the field, its value and what it must be.
    """
    flat = check_names(config, fields)
    for name, value in flat.items():
        require(name, value, _entries(value, fields[name].default) or fields[name].check(value))
    return flat


def _entries(value: object, default: object) -> str | None:
    """Check that a field of several values has values of the type that its default has."""
    if not isinstance(default, tuple) or not default:
        return None
    kinds = {bool: ("True or False", bool), str: ("names", str), int: ("numbers", int | float)}
    what, kind = kinds.get(type(default[0]), kinds[int])
    fit = all(isinstance(entry, kind) and isinstance(entry, bool) == (kind is bool) for entry in value)
    return None if fit else f"must be {what}, as in {default}"


def require(name: str, value: object, wrong: str | None) -> None:
    """Raise a UserError about a field if there is something wrong with its value."""
    if wrong:
        raise UserError(f"config.{name}={value!r} {wrong}")


def local(value: str) -> str | None:
    """Check a path, which may be empty; those that read it expand `~`."""
    return refusal(value, any_path)


def on_disk(value: str) -> str | None:
    """Check a path, which may be empty, that cannot be in a bucket."""
    return refusal(value, local_path)


def weights(value: str) -> str | None:
    """Check a path of weights, local or `hf://ORG/NAME[@REVISION]`, which may be empty."""
    return refusal(value, weights_path)


def refusal(value: str, read: Callable[[str], object]) -> str | None:
    """Return why a value cannot be used if `read` raises a UserError for it, else None."""
    try:
        read(value)
    except UserError as error:
        return f"cannot be used: {str(error).removeprefix(f'{value}: ')}"
    return None


def listed(value: str) -> list[str]:
    """Return the paths of a field that names several, separated by commas."""
    return [path.strip() for path in value.split(",") if path.strip()]


def all_local(value: str) -> str | None:
    """Check a field that names several paths, or none."""
    return next((problem for path in listed(value) if (problem := local(path))), None)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parse a command line for `absl.app.run`; what absl says of a bad one is a UserError."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        if missing := re.match(r"flag --(\w+)=None: .* must have a value other than None", str(error)):
            raise UserError(f"--{missing[1]} is missing; --help lists the flags") from None
        raise UserError(f"{' '.join(str(error).split())}; --help lists the flags") from None


def flags_parser(fields_of: Callable[[str], Fields]) -> Callable[[Sequence[str]], list[str]]:
    """Return a `flags_parser` for `absl.app.run` that checks the config file and the names of fields first.

    Args:
      fields_of: path of the config file -> the fields that its config has.
    """

    def parse(argv: Sequence[str]) -> list[str]:
        named, path, argv = [], "", list(argv)
        for place, (argument, following) in enumerate(itertools.pairwise([*argv, ""])):
            if not argument.startswith("-"):
                continue
            name, assigned, value = argument.lstrip("-").partition("=")
            if name == "config":
                if path:
                    raise UserError(f"--config is given twice: {path} and {value if assigned else following}")
                try:
                    path = str(local_path(value if assigned else following))
                except UserError as error:
                    raise UserError(f"--config {error}") from None
                if not Path(path).is_file():
                    raise UserError(f"--config {path}: there is no such file")
                # ml_collections opens the file itself, and knows nothing of `~`.
                argv[place if assigned else place + 1] = f"--config={path}" if assigned else path
            elif name.startswith("config."):
                if not path:
                    raise UserError(f"--{name} comes before --config; give --config first")
                named.append(name.removeprefix("config."))
        fields = fields_of(path) if path else {}
        for name in named:
            if name not in fields:
                raise UserError(f"config.{name} does not exist{closest(name, fields)}; --explain lists every field")
        return parse_flags(argv)

    return parse
