"""What every script does with its command line: required flags, no stray arguments, quiet logs, one-line errors."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from avd_jax import methods
from avd_jax.convert.adapters import named_adapters, spelled
from avd_jax.diffusion.student import HALF_RATE_POSITIONS
from avd_jax.errors import UserError, closest, report_user_errors
from avd_jax.fields import Fields, check_names, describe, flags_parser, parse_flags
from avd_jax.generation.settings import DTYPES, SOLVERS
from avd_jax.models.low_bit import KINDS
from avd_jax.models.vae_tiles import MEMORY_GIB
from avd_jax.parallel.compiler import keep_programs
from avd_jax.parallel.hosts import connect, leaving_at_once
from avd_jax.paths import any_path, local_path, weights_path
from avd_jax.training.method import Recipe

flags.disclaim_key_flags()  # a flag that a script defines through this module is the script's, so --help shows it


class _PathParser(flags.ArgumentParser):
    """Reads a path of a flag, which may be in a bucket if `meant` is `any_path`."""

    syntactic_help = "a path"

    def __init__(self, name: str, resolve: Callable[[str], str | Path]):
        self._name, self._resolve = name, resolve

    def parse(self, argument: str) -> str:
        try:
            return str(self._resolve(argument)) if argument else argument
        except UserError as error:
            raise UserError(f"--{self._name} {error}") from None

    def flag_type(self) -> str:
        return "string"


def path_flag(name: str, default: str | None, help: str) -> flags.FlagHolder[str]:
    """Define a flag for a file or folder; its value is the path as a text, with `~` expanded (see `any_path`)."""
    return flags.DEFINE(_PathParser(name, any_path), name, default, help)


def disk_flag(name: str, default: str | None, help: str) -> flags.FlagHolder[str]:
    """Define a flag for a path that cannot be in a bucket (see `local_path`)."""
    return flags.DEFINE(_PathParser(name, local_path), name, default, help)


def weights_flag(name: str, help: str) -> flags.FlagHolder[str]:
    """Define a flag for weights that are read: as `path_flag`, or `hf://ORG/NAME[@REVISION]` (`convert/hub.py`)."""
    return flags.DEFINE(_PathParser(name, weights_path), name, None, help)


def page_named(flag: flags.FlagHolder[str]) -> Path:
    """Return the page that a flag names; a UserError keeps a slip from overwriting a file that is none."""
    page = any_path(flag.value)
    if page.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--{flag.name} {page}: is no page; give a file such as page.html")
    return page


def run(
    main: Callable[[], int | None],
    *,
    required: Sequence[flags.FlagHolder] = (),
    parse_flags: Callable[[list[str]], list[str]] = parse_flags,
) -> None:
    """Run a script's `main()` and exit with the status it returns; a UserError is one line and status 1.

    Args:
      main: the script's work, once the flags are parsed.
      required: flags that must be given.
      parse_flags: `flags_parser` of `absl.app.run`.
    """

    app.run(report_user_errors(checked(main, required)), flags_parser=report_user_errors(parse_flags))


def run_with_arguments(main: Callable[[list[str]], int | None], *, required: Sequence[flags.FlagHolder] = ()) -> None:
    """Run a script as `run` does; `main` gets the arguments that are no flags, among which flags may stand."""

    def work(argv: Sequence[str]) -> int | None:
        return checked(lambda: main(list(argv[1:])), required)(argv[:1])

    app.run(report_user_errors(work), flags_parser=report_user_errors(_parse_anywhere))


def _parse_anywhere(argv: list[str]) -> list[str]:
    """Parse flags that may stand among other arguments, and return these."""
    flags.FLAGS.set_gnu_getopt(True)
    return parse_flags(argv)


@dataclass(frozen=True)
class Command:
    """One of several things that a script does.

    Attributes:
      main: the work; with `more` it gets the further arguments.
      required: names of flags that must be given.
      optional: names of flags that may be.
      more: whether further arguments, each a path, may follow.
    """

    main: Callable[..., int | None]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    more: bool = False


def run_commands(commands: Mapping[str, Command]) -> None:
    """Run a script whose first argument says what to do, `script.py COMMAND --flag ...`, as `run` runs others."""

    def work(argv: Sequence[str]) -> int | None:
        return run_command(commands, argv[1:])

    app.run(report_user_errors(work), flags_parser=report_user_errors(_parse_anywhere))


def run_command(commands: Mapping[str, Command], arguments: Sequence[str]) -> int | None:
    """Run one of the commands once the flags are parsed (UserError for one that is none, or has wrong flags)."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if name not in commands:
        shown = f"{name!r}: is no command{closest(name, commands)}; " if name else ""
        raise UserError(f"{shown}give one of {', '.join(commands)}, before the flags (see --help)")
    command = commands[name]
    own = {*command.required, *command.optional}
    for flag in sorted({flag for other in commands.values() for flag in (*other.required, *other.optional)} - own):
        if flags.FLAGS[flag].present:
            raise UserError(f"--{flag}: does not go with {name}; leave it out")
    holders = [flags.FLAGS[flag] for flag in command.required]
    if not command.more:
        return checked(command.main, holders)(["", *rest])
    return checked(lambda: command.main([str(any_path(path)) for path in rest]), holders)([""])


def define_sampling() -> tuple[tuple[str, ...], Callable[[], dict]]:
    """Define the flags that decide a video beside its weights, prompt and seed; they depend on the weights.

    Returns:
      Their names, and a function that returns what was given, for `Options`.
    """
    made_for = "Default: what the weights were made for, else"
    given = (
        flags.DEFINE_enum("solver", None, SOLVERS, "Default: student with a --checkpoint, else unipc."),
        define_which(),
        define_lora(),
        flags.DEFINE_integer("steps", None, "Steps of unipc. Default: 50. Or fewer of a student that serves them."),
        flags.DEFINE_float("shift", None, "Timestep shift of unipc. Default: 5."),
        flags.DEFINE_float("guidance_scale", None, "Guidance of unipc, Wan's convention. Default: 5."),
        flags.DEFINE_string("negative_prompt", None, "What unipc's guidance avoids. Default: Wan's."),
        flags.DEFINE_integer("half_rate_steps", None, "First steps of a student on every second frame; 0: none."),
        flags.DEFINE_enum(
            "half_rate_positions", None, HALF_RATE_POSITIONS, "Of their frames. Default: as it was trained."
        ),
        flags.DEFINE_integer("frames", None, f"Frames of a video, 4n+1. {made_for} 81."),
        flags.DEFINE_integer("height", None, f"Pixels, a multiple of 16. {made_for} 480."),
        flags.DEFINE_integer("width", None, f"Pixels, a multiple of 16. {made_for} 832."),
        flags.DEFINE_float("fps", None, f"Frames per second. {made_for} 16."),
        flags.DEFINE_enum("dtype", None, DTYPES, "Of the networks, VAE excepted. Default: bfloat16, on a CPU float32."),
        flags.DEFINE_enum("weights_dtype", None, KINDS, "8 bits for the transformer's weights. Default: as --dtype."),
    )
    for flag in given:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])  # --help shows it as the script's
    return tuple(flag.name for flag in given), lambda: {flag.name: flag.value for flag in given}


def numbers_of(flag: flags.FlagHolder[list[str] | None]) -> list[int]:
    """Return the numbers of a repeatable flag, of which each may be several, separated by commas."""
    texts = [text for value in flag.value or () for text in value.split(",")]
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise UserError(f"--{flag.name} {','.join(texts)}: give whole numbers, separated by commas") from None


def define_which() -> flags.FlagHolder:
    """Define --which, as every script has it that takes weights."""
    flag = flags.DEFINE_string(
        "which", None, "Network, where there are several: ema of a run, or its name in a file. Default: generator."
    )
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])  # --help shows it as the script's
    return flag


class _LoraParser(flags.ArgumentParser):
    """Reads a flag that names adapters."""

    syntactic_help = "adapters, FILE[:STRENGTH] separated by commas"

    def parse(self, argument: str) -> str:
        try:
            return ",".join(spelled(named_adapters(argument)))
        except UserError as error:
            raise UserError(f"--lora {error}") from None

    def flag_type(self) -> str:
        return "string"


def define_lora() -> flags.FlagHolder[str]:
    """Define --lora, as every script has it that makes or writes something of a transformer."""
    what = "LoRAs to merge into the transformer, FILE[:STRENGTH] separated by commas (docs/adapters.md)."
    flag = flags.DEFINE(_LoraParser(), "lora", None, what)
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])  # --help shows it as the script's
    return flag


def define_vae_gib() -> flags.FlagHolder:
    """Define --vae_gib, as every script has it that runs the video autoencoder."""
    flag = flags.DEFINE_float("vae_gib", MEMORY_GIB, "GiB of a device that the VAE may take.")
    flags.register_validator(flag, lambda gib: gib > 0, "give a number above 0")  # as NaN is not
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    return flag


HOSTS = ("coordinator", "num_processes", "process_id")


def define_hosts() -> Callable[..., None]:
    """Define the flags HOSTS, which tell one of several processes who takes part.

    Returns:
      A function that joins the others, see `hosts.connect`, and keeps compiled programs in the folder that it is given,
      see `keep_programs`; to be called before anything touches a device.
    """
    given = (
        flags.DEFINE_string("coordinator", None, "of several processes: HOST:PORT of process 0"),
        flags.DEFINE_integer("num_processes", None, "of several processes: how many"),
        flags.DEFINE_integer("process_id", None, "of several processes: the number of this one, from 0"),
    )
    for flag in given:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])  # --help shows it as the script's

    def join(programs: Path | None = None) -> None:
        connect(**{flag.name: flag.value for flag in given})
        keep_programs(programs)

    return join


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
    workdir = path_flag("workdir", None, "the folder of the run: config, checkpoints, metrics")
    settled = _define_config(fields_of)
    connect_hosts = define_hosts()
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[workdir.name])  # --help shows it as the script's

    def work_or_explain() -> int:
        config = settled()
        if config is None:
            return 0
        check_given((workdir, *required))
        folder = any_path(workdir.value)
        connect_hosts(folder / "compiled")
        return work(config, folder)

    run(leaving_at_once(work_or_explain), parse_flags=flags_parser(fields_of_file))


def run_with_config(
    work: Callable[[object], int | None], *, fields: Fields, required: Sequence[flags.FlagHolder] = ()
) -> None:
    """Run a script that works by a config on this machine; it gets the flags --config and --explain.

    Args:
      work: `config` -> exit status.
      fields: those of its config.
      required: flags that must be given to work.
    """
    settled = _define_config(lambda config: fields)

    def work_or_explain() -> int | None:
        config = settled()
        if config is None:
            return 0
        check_given(required)
        return work(config)

    run(work_or_explain, parse_flags=flags_parser(lambda path: fields))


def _define_config(fields_of: Callable[[object], Fields]) -> Callable[[], object | None]:
    """Define --config and --explain; return a function that returns the config, or explains it and returns None."""
    config = config_flags.DEFINE_config_file("config", None, "config file; set a field with --config.FIELD=VALUE")
    explain = flags.DEFINE_bool("explain", False, "print every field of the config with its help, and stop")
    for flag in ("config", explain.name):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag])  # --help shows them as the script's
    flags.mark_flag_as_required("config")

    def settled() -> object | None:
        fields = fields_of(config.value)
        check_names(config.value, fields)
        if not explain.value:
            return config.value
        print(describe(config.value, fields))
        return None

    return settled


def checked(main: Callable[[], int | None], required: Sequence[flags.FlagHolder]) -> Callable:
    """Return `main` as a function of what is left of the command line; it raises UserErrors as they are."""

    def checked_main(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.FATAL)  # Orbax reports every step that it takes, and errors that we report
        if len(argv) > 1:
            raise UserError(f"{argv[1]!r} is not a flag; every argument has a name, and text needs quotes (see --help)")
        check_given(required)
        return main()

    return checked_main


def check_given(required: Sequence[flags.FlagHolder]) -> None:
    """Raise a UserError that names a flag which must be given and is not."""
    for flag in required:
        if not flag.value:
            raise UserError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")
