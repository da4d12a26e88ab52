"""What every script does with its command line: required flags, no stray arguments, quiet logs, one-line errors."""

from collections.abc import Callable, Sequence

from absl import app, flags, logging

from avd_jax.errors import UserError, report_user_errors


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


def checked(main: Callable[[], int | None], required: Sequence[flags.FlagHolder]) -> Callable:
    """Return `main` as a function of what is left of the command line; it raises UserErrors as they are."""

    def checked_main(argv: Sequence[str]) -> int | None:
        logging.set_verbosity(logging.FATAL)  # Orbax reports every step that it takes, and errors that we report
        if len(argv) > 1:
            raise UserError(f"{argv[1]!r} is not a flag; every argument has a name, and text needs quotes (see --help)")
        for flag in required:
            if not flag.value:
                raise UserError(f"--{flag.name} is missing: {flags.FLAGS[flag.name].help}")
        return main()

    return checked_main
