"""What every script does with its command line: required flags, no stray arguments, quiet logs, one-line errors."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from avd_jax import methods
from avd_jax.errors import UserError, report_user_errors
from avd_jax.models.vae_tiles import MEMORY_GIB
from avd_jax.parallel.compiler import keep_programs
from avd_jax.parallel.hosts import connect, leaving_at_once
from avd_jax.paths import local_path
from avd_jax.training.fields import Fields, check_names, describe, flags_parser
from avd_jax.training.method import Recipe

flags.disclaim_key_flags()  # a flag that a script defines through this module is the script's, so --help shows it


class _PathParser(flags.ArgumentParser):
    """Reads a path of a flag as a local one."""

    syntactic_help = "a local path"

    def __init__(self, name: str):
        self._name = name

    def parse(self, argument: str) -> str:
        try:
            return str(local_path(argument)) if argument else argument
        except UserError as error:
            raise UserError(f"--{self._name} {error}") from None

    def flag_type(self) -> str:
        return "string"


def path_flag(name: str, default: str | None, help: str) -> flags.FlagHolder[str]:
    """Define a flag for a file or folder; its value is the path as a text, with `~` expanded (see `local_path`)."""
    return flags.DEFINE(_PathParser(name), name, default, help)


def run(
    main: Callable[[], int | None],
    *,
    required: Sequence[flags.FlagHolder] = (),
    parse_flags: Callable[[list[str]], list[str]] = app.parse_flags_with_usage,
) -> None:
    """Run a script's `main()` and exit with the status it returns; a UserError is one line and status 1.

    Args:
      main: the script's work, once the flags are parsed.
      required: flags that must be given.
      parse_flags: `flags_parser` of `absl.app.run`.
    """

    app.run(report_user_errors(checked(main, required)), flags_parser=report_user_errors(parse_flags))


def define_which() -> flags.FlagHolder:
    """Define --which, as every script has it that takes weights."""
    flag = flags.DEFINE_string(
        "which", None, "Network, where there are several: ema of a run, or its name in a file. Default: generator."
    )
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])  # --help shows it as the script's
    return flag


def define_vae_gib() -> flags.FlagHolder:
    """Define --vae_gib, as every script has it that runs the video autoencoder."""
    flag = flags.DEFINE_float("vae_gib", MEMORY_GIB, "GiB of a device that the VAE may take.")
    flags.register_validator(flag, lambda gib: gib > 0, "give a number above 0")  # as NaN is not
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    return flag


def define_hosts() -> Callable[[], None]:
    """Define the flags that tell one of several processes who takes part.

    Returns:
      A function that joins the others, see `hosts.connect`; to be called before anything touches a device.
    """
    given = (
        flags.DEFINE_string("coordinator", None, "of several processes: HOST:PORT of process 0"),
        flags.DEFINE_integer("num_processes", None, "of several processes: how many"),
        flags.DEFINE_integer("process_id", None, "of several processes: the number of this one, from 0"),
    )
    for flag in given:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])  # --help shows it as the script's
    return lambda: connect(**{flag.name: flag.value for flag in given})


def run_training(
    train: Callable[[Recipe, object, Path], int], *, method: str = "", required: Sequence[flags.FlagHolder] = ()
) -> None:
    """Run a script that trains by a config, on one host or several.

    It gets the flags of `run_configured`, and --which.

    Args:
      train: `(recipe, config, workdir)` -> exit status; the recipe is that of the method which the config names.
      method: the one that the script is for; empty for any.
      required: further flags that must be given to train.
    """
    which = define_which()

    def fields_of(config) -> Fields:
        recipe = methods.get(config.get("method", ""))
        if method and recipe.name != method:
            raise UserError(
                f"config.method={recipe.name!r}: this script is for {method!r}; run scripts/train.py, which takes any"
            )
        check_names(config, recipe.fields)
        if which.value:
            if "which" not in recipe.fields:
                raise UserError(f"--which: the method {recipe.name!r} starts from no network; leave it out")
            config.which = which.value  # as --config.which would
        return recipe.fields

    run_configured(
        lambda config, workdir: train(methods.get(config.method), config, workdir),
        fields_of=fields_of,
        fields_of_file=methods.fields_of_file,
        required=required,
    )


def run_configured(
    work: Callable[[object, Path], int],
    *,
    fields_of: Callable[[object], Fields],
    fields_of_file: Callable[[str], Fields],
    required: Sequence[flags.FlagHolder] = (),
) -> None:
    """Run a script that works by a config in a folder, on one host or several.

    It gets the flags --config, --workdir and --explain, and those that tell one of several processes who takes part.

    Args:
      work: `(config, workdir)` -> exit status.
      fields_of: a config -> its fields; raises a UserError if the script does not take it.
      fields_of_file: path of a config file -> the fields of its config.
      required: further flags that must be given to work.
    """
    config = config_flags.DEFINE_config_file("config", None, "config file; set a field with --config.FIELD=VALUE")
    workdir = path_flag("workdir", None, "the folder of the run: config, checkpoints, metrics")
    explain = flags.DEFINE_bool("explain", False, "print every field of the config with its help, and stop")
    connect_hosts = define_hosts()
    for flag in ("config", workdir.name, explain.name):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag])  # --help shows them as the script's
    flags.mark_flag_as_required("config")

    def work_or_explain() -> int:
        fields = fields_of(config.value)
        check_names(config.value, fields)
        if explain.value:
            print(describe(config.value, fields))
            return 0
        _check_given((workdir, *required))
        connect_hosts()
        keep_programs(Path(workdir.value) / "compiled")
        return work(config.value, Path(workdir.value))

    run(leaving_at_once(work_or_explain), parse_flags=flags_parser(fields_of_file))


def checked(main: Callable[[], int | None], required: Sequence[flags.FlagHolder]) -> Callable:
    """Return `main` as a function of what is left of the command line; it raises UserErrors as they are."""

    def checked_main(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.FATAL)  # Orbax reports every step that it takes, and errors that we report
        if len(argv) > 1:
            raise UserError(f"{argv[1]!r} is not a flag; every argument has a name, and text needs quotes (see --help)")
        _check_given(required)
        return main()

    return checked_main


def _check_given(required: Sequence[flags.FlagHolder]) -> None:
    for flag in required:
        if not flag.value:
            raise UserError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")
