"""Curate raw videos into a training set: cut them at their scenes, score the clips, select and caption them.

  python scripts/curate.py --config configs/curation.py --videos videos/ --out curated
  python scripts/curate.py --config configs/curation.py --videos list.jsonl --out curated --stages resolution,motion
  python scripts/curate.py --config configs/curation.py --videos videos/ --out curated --runner beam

Writes clips.jsonl (each clip with its scores, and which stage rejected it), captions.jsonl (what scripts/encode.py
takes), summary.json and report.html. What is measured is kept in --out: the same command continues after a kill,
analyses only new videos if there are more, and applies other thresholds at once. docs/curation.md says the rest.
"""

import os

from absl import flags

from avd_jax import command_line
from avd_jax.curation import pipeline, settings, sources
from avd_jax.curation.selection import STAGES
from avd_jax.data.atomic import only_writer
from avd_jax.errors import UserError, closest, leave
from avd_jax.paths import any_path

VIDEOS = command_line.disk_flag("videos", None, "Folder of videos, or a list of them: jsonl, json, csv or tsv.")
OUT = command_line.disk_flag("out", None, "Folder of the four files, and of what was measured.")
ONLY = flags.DEFINE_list("stages", ",".join(STAGES), "Those that may reject clips; the others are skipped.")
RUNNER = flags.DEFINE_enum("runner", "pool", ("pool", "beam"), "What analyses the videos: processes here, or Beam.")
BEAM_ARGS = flags.DEFINE_string("beam_args", "", "Flags of Apache Beam, in one text. Default: processes here.")
WORKERS = flags.DEFINE_integer("workers", None, "Processes. Default: one a core.", lower_bound=1)


def check_flags() -> None:
    """Raise a UserError that names the flag to mend."""
    for name in ONLY.value:
        if name not in STAGES:
            raise UserError(f"--stages: there is no stage {name!r}{closest(name, STAGES)}; take of {','.join(STAGES)}")
    if BEAM_ARGS.value and RUNNER.value != "beam":
        raise UserError("--beam_args: only goes with --runner beam")


def runner(config, workers: int):
    """Return what analyses videos, as --runner says."""
    if RUNNER.value == "pool":
        return pipeline.pool_runner(config, workers)
    from avd_jax.curation.beam import beam_runner  # an extra, which need not be installed

    return beam_runner(config, workers, BEAM_ARGS.value)


def curate(config) -> None:
    """Curate as the flags say, and tell what came out."""
    check_flags()
    settings.validate(config)
    out, workers = any_path(OUT.value), WORKERS.value or len(os.sched_getaffinity(0))
    run, videos = runner(config, workers), sources.find(VIDEOS.value)
    with only_writer(out):
        curation = pipeline.Curation(config, videos, out, stages=ONLY.value, workers=workers)
        rows = curation.analyse(run)
        summary = curation.select(rows)
        curation.write(rows, summary)
    print(f"{summary['videos']} videos, {summary['readable']} readable, {summary['clips']} clips")
    for entry in summary["funnel"]:
        skipped = f"   skipped: {entry['skipped']}" if "skipped" in entry else ""
        print(f"  {entry['stage']:<20} {entry['in']:>8} -> {entry['out']}{skipped}")
        for found in entry.get("reasons", [])[:3]:
            print(f"    {found['clips']} rejected: {found['reason']}")
    for entry in summary["unreadable"][:10]:
        print(f"  left out {entry['source']}: {entry['reason']}")
    if len(summary["unreadable"]) > 10:
        print(f"  left out {len(summary['unreadable']) - 10} more, see summary.json")
    if summary["selected"] and any(e["stage"] == "caption" and "skipped" in e for e in summary["funnel"]):
        print("captions.jsonl has no captions: give config.caption.endpoint, or fill them in, before scripts/encode.py")
    print(out / "report.html")
    if not summary["readable"]:
        raise UserError(f"{VIDEOS.value}: none of its {summary['videos']} videos can be read")
    if curation.failure:
        raise UserError(curation.failure)


def interruptible(config) -> None:
    """Curate; Ctrl-C is no fault."""
    try:
        curate(config)
    except KeyboardInterrupt:
        leave("interrupted; the same command continues", 130)  # answers that are still awaited are not waited for


if __name__ == "__main__":
    command_line.run_with_config(interruptible, fields=settings.FIELDS, required=(VIDEOS, OUT))
