"""Serve a page: a blind vote on the videos of several methods.

  python scripts/serve.py --compare ours=out/a theirs=out/b dmd=out/c --votes votes.jsonl
  python scripts/serve.py --votes votes.jsonl --report results.html

People vote on pairs of videos of the same prompt and seed without knowing whose they are. The second prints what it
came to and writes it as a page.

It is on this machine only (127.0.0.1) unless --host says otherwise. Nothing comes from the network.
"""

from pathlib import Path

from absl import flags

from avd_jax import command_line
from avd_jax.errors import UserError
from avd_jax.serving.server import App, Server
from avd_jax.serving.study import BlindStudy, named_folders
from avd_jax.serving.vote_report import results_text, write_results
from avd_jax.serving.votes import VoteFile

COMPARE = flags.DEFINE_string("compare", None, "NAME=FOLDER of a method's videos; further ones may follow it.")
VOTES = command_line.path_flag("votes", None, "File of the votes; one that is there is continued.")
REPORT = command_line.path_flag("report", None, "Write the results of --votes to this page, print them, and stop.")
SEED = flags.DEFINE_integer("seed", 0, "Of the vote: decides the order and the sides of the pairs.")
PER_PAIR = flags.DEFINE_integer("per_pair", 3, "People who should vote on each pair.", lower_bound=1)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Name or address to listen on; 0.0.0.0 is reached from everywhere.")
PORT = flags.DEFINE_integer("port", 7860, "Port to listen on; 0 takes a free one.", lower_bound=0)


def main(more: list[str]) -> None:
    """Serve what the flags ask for."""
    if more and not COMPARE.value:
        raise UserError(f"{more[0]!r} is not a flag; every argument has a name, and text needs quotes (see --help)")
    if not COMPARE.value and not REPORT.value:
        raise UserError("give --compare NAME=FOLDER NAME=FOLDER for a vote, or --report for the results of one")
    if not VOTES.value:
        raise UserError(f"--votes is missing: {flags.FLAGS['votes'].help}")
    if REPORT.value:
        if COMPARE.value:
            raise UserError("--report: does not go with --compare; the server's own page of results is printed there")
        votes = VoteFile(Path(VOTES.value))
        write_results(votes, Path(REPORT.value))
        print(results_text(votes))
        return
    study = BlindStudy(
        named_folders([COMPARE.value, *more]), Path(VOTES.value), seed=SEED.value, per_pair=PER_PAIR.value
    )
    server = listen(study.app())
    print(f"{len(study.pairs)} pairs to vote on: {server.url}")
    print(f"results, not for those who vote: {server.url}{study.report_name}", flush=True)
    server.serve()


def listen(app: App) -> Server:
    """Open the port, and say who can reach it."""
    server = Server(app, host=HOST.value, port=PORT.value)
    if not server.is_local:
        print(f"--host {HOST.value}: everybody who reaches this machine can use the page; it asks for no password")
    return server


if __name__ == "__main__":
    command_line.run_with_arguments(main)
