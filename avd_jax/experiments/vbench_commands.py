"""The commands of scripts/vbench.py, as functions of the values of its flags."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from avd_jax.data import leakage as leaks
from avd_jax.data.atomic import write_text
from avd_jax.errors import UserError, note
from avd_jax.evaluation.vbench import check as preflight
from avd_jax.evaluation.vbench import manifest, score_table, scores
from avd_jax.evaluation.vbench.suites import SUITES, VBENCH, Suite, read_info
from avd_jax.evaluation.vbench.videos import folders_of, wanted
from avd_jax.experiments import vbench_export, vbench_measure
from avd_jax.generation.run import reporting
from avd_jax.generation.settings import Options, resolve
from avd_jax.parallel.hosts import is_first


def export(given: Any, sampling: Mapping[str, object]) -> None:
    """Say what there is to make and, unless that is all, make it.

    Args:
      given: has the value of each flag as an attribute.
      sampling: of the flags that decide a video.
    """
    suite, info = _suite_and_info(given)
    extended, prompt_file = None, None
    if given.prompt_file:
        extended, prompt_file = vbench_export.extended_prompts(info, given.prompt_file, given.prompt_order)
    elif given.prompt_order:
        raise UserError("--prompt_order: only goes with --prompt_file; leave it out")
    source = given.checkpoint or given.weights
    name = given.name or (Path(source).absolute().name if source else "model")
    what = {"suite": suite, "info": info, "limits": _limits(given, suite), "seed": given.seed, "extended": extended}
    task = vbench_export.Export(Path(given.out), model=name, prompt_file=prompt_file, **what)
    notes: list[str] = []
    settings = None
    if given.weights or not given.dry_run:
        settings = resolve(Options(weights=given.weights, checkpoint=given.checkpoint, **sampling), note=notes.append)
    hosts = given.num_processes or (1 if given.dry_run else jax.process_count())
    first = given.dry_run or is_first()
    if first:
        for line in notes:
            print(line)
        print(vbench_export.describe(task, settings, seconds=given.seconds_a_video, hosts=hosts), flush=True)
    if given.json and first:
        _write_json(given.json, {"files": vbench_export.files_of(task)})
    if given.dry_run:
        return
    with tqdm(unit="video", disable=not first) as bar:

        def start(there: int, share: int) -> None:
            bar.total, bar.initial = there + share, there
            bar.update(there)

        made = vbench_export.run(
            task,
            settings,
            batch_size=given.batch_size,
            command=shlex.join(sys.argv),
            fsdp=given.fsdp,
            seq=given.seq,
            prompt_cache=given.prompt_cache,
            vae_gib=given.vae_gib,
            on_start=start,
            on_progress=bar.update,
            note=lambda line: bar.write(line) if first else None,
        )
    if first:
        whole = len(task.jobs())
        print(f"{given.out}: {whole} videos are there, {made} of them made now on this host; score them with run.sh")


def check(given: Any) -> int:
    """Print what is wrong with a folder of videos; return 1 if anything is."""
    suite, info = _suite_and_info(given)
    folder, about, limits = _videos(given, suite)
    shape, findings = None, []
    if about is not None:
        shape = manifest.shape_of(about)
        if about["list"]["digest"] != info.digest:
            what = f"is not the list that {given.videos} was exported with"
            findings.append(preflight.Finding(preflight.OTHER_VERSION, given.info, what))
    with tqdm(total=len(wanted(suite, info, limits)), unit="video", delay=1) as bar:
        findings += preflight.check(folder, suite, info, limits, shape=shape, on_progress=bar.update)
    if given.json:
        _write_json(given.json, {"findings": [vars(finding) for finding in findings]})
    if findings:
        print(preflight.report(findings))
        return 1
    print(f"{folder}: {len(wanted(suite, info, limits))} videos, nothing is wrong")
    return 0


def score(given: Any) -> None:
    """Print the scores of official results (UserError, behind the table, if there is no total)."""
    suite = SUITES[given.suite]
    results = scores.read_results(Path(given.results), suite)
    others = scores.read_results(Path(given.beside), suite) if given.beside else None
    record = score_table.as_record(suite, results, others)
    if given.json:
        _write_json(given.json, record)
    print(score_table.table(suite, results, others), flush=True)
    for folder, missing in (
        (given.results, record["missing"]),
        (given.beside, record.get("beside", {}).get("missing")),
    ):
        if missing:
            raise UserError(f"{folder}: no total, since {len(missing)} dimensions are missing: {', '.join(missing)}")


def measure(given: Any) -> None:
    """Measure what can be measured here, write its result files, and print the scores."""
    if given.suite != VBENCH.name:
        raise UserError(
            f"--suite {given.suite}: its dimensions are not measured here; score them with the official tool"
        )
    suite, info = _suite_and_info(given)
    folder, _, limits = _videos(given, suite)
    dimensions = suite.check_dimensions(given.dimensions) if given.dimensions else vbench_measure.NEEDED
    models = vbench_measure.Models(given.models)
    task = vbench_measure.Task(folder, suite, info, limits, models, Path(given.out))
    with reporting(task.out):
        report = vbench_measure.measure(task, dimensions, progress=lambda items, what: tqdm(items, desc=what, delay=1))
    for line in report.notes:
        note(line)
    for figures, what in ((report.dimensions, ""), (report.other, ": not the official figure")):
        for name, figure in figures.items():
            print(f"{name:24} {100 * figure.score:7.2f}   {figure.videos} of {figure.expected} videos{what}")
    for name, why in report.skipped.items():
        print(f"{name:24} skipped: {why}")
    if not report.dimensions:
        raise UserError(f"{given.videos}: no dimension could be measured; see above")
    print(f"{given.out}: results for score --results")


def leakage(given: Any, more: Sequence[str]) -> int:
    """Print which texts of a training are alike to those of the lists; return 1 if any is."""
    texts = leaks.read_texts(given.prompts)
    found = [leaks.leakage(texts, path) for path in (given.against, *more)]
    for benchmark in found:
        print(benchmark.report())
    touched = set().union(*(benchmark.touched for benchmark in found))
    if given.json:
        _write_json(given.json, {"lists": [benchmark.as_record() for benchmark in found]})
    if given.out:
        kept = [text.value for number, text in enumerate(texts) if number not in touched]
        with reporting(Path(given.out)):
            write_text(given.out, "".join(f"{' '.join(text.split())}\n" for text in kept))
        print(f"{given.out}: the other {len(kept)} texts")
    return 1 if touched else 0


def _suite_and_info(given: Any) -> tuple[Suite, Any]:
    suite = SUITES[given.suite]
    info = read_info(given.info, suite)
    if info.other_version:
        note(f"{given.info} is not {suite.title}'s own list: {info.other_version}; its scores compare with no others")
    return suite, info


def _videos(given: Any, suite: Suite) -> tuple[Path, dict | None, dict[str, int | None]]:
    """Return the folder of the videos, the manifest if they are an export, and of how many prompts they should be."""
    folder, about = manifest.export_of(Path(given.videos))
    limits = _limits(given, suite)
    if about is not None:
        if about["suite"] != suite.name:
            raise UserError(f"--suite {suite.name}: {given.videos} is an export of {about['suite']}; give that")
        if not given.dimensions:
            limits = {name: given.limit or limit for name, limit in about["prompts"].items()}
    return folder, about, limits


def _limits(given: Any, suite: Suite) -> dict[str, int | None]:
    dimensions = suite.check_dimensions(given.dimensions) if given.dimensions else suite.dimensions
    return dict.fromkeys(folders_of(suite, dimensions), given.limit)


def _write_json(path: str, content: Mapping) -> None:
    with reporting(Path(path)):
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
