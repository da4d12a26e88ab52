"""What can be trained: one folder a method, each with its networks, updates, terms and config fields.

A folder is a method if it is there: its `__init__.py` exports a `RECIPE`. Nothing else lists them.
"""

import importlib
import pkgutil
import runpy

from avd_jax.errors import UserError, closest
from avd_jax.training.fields import Fields
from avd_jax.training.method import Recipe


def names() -> list[str]:
    """Return the names of all methods."""
    return [module.name for module in pkgutil.iter_modules(__path__) if module.ispkg]


def get(name: str) -> Recipe:
    """Return a method by name; raises a UserError that names the closest if there is none."""
    if name not in names():
        raise UserError(
            f"config.method={name!r}: there is no such method{closest(name, names())}; it is one of "
            + ", ".join(names())
        )
    return importlib.import_module(f"{__name__}.{name}").RECIPE


def fields_of_file(path: str) -> Fields:
    """Return the fields of the method that a config file names.

    Raises:
      UserError: the file is no config, or names no method.
    """
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise UserError(f"{path}: is no config; it must define get_config()")
    try:
        config = get_config()
    except (AttributeError, KeyError, TypeError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{path}: sets a field that does not exist, or to a value of another type ({text})") from error
    return get(config.get("method", "")).fields
