"""Configs made from a table of fields, `dotted name -> (default, help line)`."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ml_collections
from absl import app

from avd_jax.errors import UserError, closest

Fields = Mapping[str, tuple[object, str]]


def config_from(fields: Fields) -> ml_collections.ConfigDict:
    """Return a config with every field at its default; fields can be set, not added."""
    config = ml_collections.ConfigDict()
    for name, (value, _) in fields.items():
        *parents, leaf = name.split(".")
        node = config
        for parent in parents:
            if parent not in node:
                node[parent] = ml_collections.ConfigDict()
            node = node[parent]
        node[leaf] = value
    return config.lock()


def with_defaults(fields: Fields, **defaults: object) -> dict[str, tuple[object, str]]:
    """Return a copy of a table in which some fields have other defaults; `__` stands for the dot of a name."""
    changed = {name.replace("__", "."): value for name, value in defaults.items()}
    return dict(fields) | {name: (value, fields[name][1]) for name, value in changed.items()}


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
    """Return one line a field: name, value, help."""
    flat = flatten(config)
    width = max(len(f"{name} = {value}") for name, value in flat.items())
    return "\n".join(f"{f'{name} = {value}':<{width}}  {fields[name][1]}" for name, value in flat.items())


def check_names(config, fields: Fields) -> dict[str, object]:
    """Return the flat config, having checked that it is one of these fields (UserError names one that is not)."""
    flat = flatten(config)
    for name in flat:
        if name not in fields:
            raise UserError(f"config.{name} does not exist{closest(name, fields)}")
    return flat


def flags_parser(fields: Fields) -> Callable[[Sequence[str]], list[str]]:
    """Return a `flags_parser` for `absl.app.run` that checks the config file and the names of fields first."""

    def parse(argv: Sequence[str]) -> list[str]:
        for argument, following in itertools.pairwise([*argv, ""]):
            if not argument.startswith("-"):
                continue
            name, assigned, value = argument.lstrip("-").partition("=")
            if name == "config" and not Path(value if assigned else following).is_file():
                raise UserError(f"--config {value if assigned else following}: there is no such file")
            field = name.removeprefix("config.")
            if field != name and field not in fields:
                raise UserError(f"config.{field} does not exist{closest(field, fields)}; --explain lists every field")
        return app.parse_flags_with_usage(list(argv))

    return parse
