"""What can be trained: one folder a method, each with its networks, updates, terms and config fields.

A folder is a method if it is there: its `__init__.py` exports a `RECIPE`. Nothing else lists them.
"""

import importlib
import pkgutil
import re
import runpy

from avd_jax.errors import UserError, closest
from avd_jax.fields import Fields
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
      UserError: the file is no config, sets a field that does not exist, or names no method.
    """
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise UserError(f"{path}: is no config; it must define get_config()")
        config = get_config()
    except (ImportError, SyntaxError) as error:
        raise UserError(
            f"{path}: cannot be run ({_one_line(error)}); compare it with configs/tiny.py, whose imports are today's"
        ) from error
    except (AttributeError, KeyError) as error:
        raise UserError(f"{path}: {_unknown_field(error)}") from error
    except TypeError as error:
        raise UserError(f"{path}: sets a field to a value of another type ({_one_line(error)})") from error
    return get(config.get("method", "")).fields


def _unknown_field(error: Exception) -> str:
    """Return which field a config file sets that is not there; ml_collections names it in a long list of all."""
    found = re.search(r"[\"'](\w+)[\"']", str(error))
    if found is None:
        return f"sets a field that does not exist ({_one_line(error)})"
    known = {part for name in names() for field in get(name).fields for part in field.split(".")} - {found[1]}
    return f"sets the field {found[1]!r}, which does not exist there{closest(found[1], known)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
