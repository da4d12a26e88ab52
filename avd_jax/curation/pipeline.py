"""A whole curation: analyse each video once, then decide about all clips, and write down what was decided.

What costs time (analysis, features, captions) is kept by video or clip in a `Store`; what it decides is made anew from
that by each call. So a call that was killed is repeated for what was missing, and gives the same files.
"""

import base64
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from avd_jax.curation import report, scoring, selection
from avd_jax.curation.captioning import BLOCKED, ERROR, SUCCESS, TRUNCATED, Captioner, Outcome, ask_all, clip_reader
from avd_jax.curation.cuts import check_installed
from avd_jax.curation.held_out import held_out
from avd_jax.curation.runner import run_pool
from avd_jax.curation.selection import BEST, STAGES, Row, Verdict
from avd_jax.curation.sources import Source
from avd_jax.curation.store import Store, identity, writing
from avd_jax.data.atomic import write_text
from avd_jax.data.leakage import read_texts
from avd_jax.fields import listed

ANALYSE, THUMBNAIL = "avd_jax.curation.analysis:analyse", "avd_jax.curation.thumbnails:thumbnail"
ANALYSIS, CAPTIONS, PICTURES = "analysis", "captions", "pictures"
GIVEN = "given"  # who wrote a caption that came with its video
HELD_OUT = "held_out"  # outcome of a caption that is like one of config.caption.held_out
MOST_REASONS = 10  # of clips without a caption that summary.json lists


@dataclass(frozen=True)
class Job:
    """A video to analyse: its name, its path, and what the result is made from."""

    name: str
    path: str
    made_from: dict


def keep(store: Store, job: Job, result: dict | None, wrong: str | None) -> None:
    """Keep the analysis of a video; one that broke its process is tried again by the next command."""
    store.put(ANALYSIS, job.name, job.made_from, {"error": wrong, "broke": True} if wrong else result)


def pool_runner(config, workers: int) -> Callable[[Sequence[Job], Store], None]:
    """Return a function that analyses videos in processes of this machine."""
    limits, settings = config.limits, config.analysis.to_dict()

    def run(jobs: Sequence[Job], store: Store) -> None:
        by_name = {job.name: job for job in jobs}
        calls = ((job.name, [job.path, settings]) for job in jobs)
        with tqdm(total=len(jobs), desc="analysis", unit="video") as bar:
            for name, result, wrong in run_pool(
                ANALYSE, calls, workers=min(workers, len(jobs)), seconds=limits.seconds, memory_gib=limits.memory_gib
            ):
                keep(store, by_name[name], result, wrong)
                bar.update()

    return run


class Curation:
    """One call of the command: its settings, its videos and what is known of them.

    Attributes:
      failure: why clips that need a caption have none, once `select` has found out; None if the server answers.
    """

    def __init__(self, config, sources: Sequence[Source], out: Path, *, stages: Iterable[str], workers: int):
        """Take the settings, and find out now what would stop the work later.

        Args:
          config: validated, see `settings`.
          sources: the videos.
          out: folder of the files and of the store.
          stages: names of those that may reject clips.
          workers: processes for the pictures of the report.

        Raises:
          UserError: the vision models cannot be loaded, the key for captions is none, or a list of held-out prompts
            cannot be read.
        """
        self._config, self._out, self._store = config, out, Store(out)
        self._sources = {source.name: source for source in sources}
        self._stages, self._workers = {"length", *stages}, workers
        self._identities: dict[str, dict] = {}
        self._unreadable = {source.name: source.problem for source in sources if source.problem}
        self._vision = scoring.load(config.features.weights) if self._stages & set(BEST) else None
        asks = config.caption.endpoint and "caption" in self._stages
        self._captioner = Captioner(config.caption) if asks else None
        self._embeddings: dict[str, Sequence[float]] = {}
        self._scored: set[str] = set()
        self._missing: Mapping[str, str] | None = (
            None  # stage -> why there are no models for it, once they were looked for
        )
        self.failure: str | None = None
        for path in listed(config.caption.held_out):
            read_texts(path)

    def analyse(self, run: Callable[[Sequence[Job], Store], None]) -> list[Row]:
        """Analyse the videos that have not been, and return the rows of all clips, by video and time."""
        check_installed()
        settings, jobs = self._config.analysis.to_dict(), []
        for source in self._sources.values():
            if source.problem:
                continue
            try:
                self._identities[source.name] = identity(source.name, source.path)
            except OSError as error:
                self._unreadable[source.name] = f"cannot be read ({error.strerror})"
                continue
            made_from = {**self._identities[source.name], "settings": settings}
            jobs.append(Job(source.name, str(source.path), made_from))
        missing = [job for job in jobs if self._analysis_of(job).get("broke")]
        if missing:
            run(missing, self._store)
        rows = []
        for job in jobs:
            analysis = self._analysis_of(job)
            if analysis["error"]:
                self._unreadable[job.name] = analysis["error"].removeprefix(f"{job.path}: ")
            else:
                rows += selection.rows_of(job.name, analysis)
        return sorted(rows, key=lambda row: (row["source"], row["start"], row["end"]))

    def _analysis_of(self, job: Job) -> dict:
        kept = self._store.get(ANALYSIS, job.name, job.made_from)
        return kept if isinstance(kept, dict) and "error" in kept else BROKEN

    def select(self, rows: Sequence[Row]) -> dict:
        """Decide about every row, in place, and return the summary."""
        funnel, left = [], list(rows)
        if self._config.features.all and self._stages & set(BEST):
            self._score([row for row in rows if not row["too_short"]])
        for stage in STAGES:
            skipped, verdict = self._verdict(stage, left)
            for row in left:
                if row["id"] in verdict.rejected:
                    row["rejected_by"] = stage
                if row["id"] in verdict.copy_of:
                    row["copy_of"] = verdict.copy_of[row["id"]]
            count, left = len(left), [row for row in left if row["rejected_by"] is None]
            entry = {"stage": stage, "in": count, "out": len(left), "threshold": verdict.threshold, **verdict.details}
            funnel.append(entry | ({"skipped": skipped} if skipped else {}))
        return {
            "videos": len(self._sources),
            "readable": len(self._sources) - len(self._unreadable),
            "clips": sum(not row["too_short"] for row in rows),
            "selected": len(left),
            "funnel": funnel,
            "unreadable": [{"source": name, "reason": reason} for name, reason in sorted(self._unreadable.items())],
            "config": self._config.to_dict(),
        }

    def write(self, rows: Sequence[Row], summary: Mapping) -> None:
        """Write clips.jsonl, captions.jsonl, summary.json and report.html."""
        shown = [{name: entry for name, entry in row.items() if name != "too_short"} for row in rows]
        place = os.path.realpath(self._out)
        selected = [
            {
                # So that both folders may be moved together, and a clip is still the same to encode.py.
                "file": os.path.relpath(os.path.realpath(self._sources[row["source"]].path), place),
                **{name: row[name] for name in ("start", "end")},
                "caption": row["caption"]["text"] if "caption" in row else "",
                "scores": {name: found for name in row["scores"] if (found := selection.value(row, name)) is not None},
            }
            for row in rows
            if row["rejected_by"] is None
        ]
        with writing(self._out):
            write_text(self._out / "clips.jsonl", _lines(shown))
            write_text(self._out / "captions.jsonl", _lines(selected))
            write_text(self._out / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        most = self._config.report.pictures
        pictures = self._pictures([row for some in report.shown(rows, most).values() for row in some])
        report.write_report(self._out / "report.html", summary, rows, pictures, most)

    def _verdict(self, stage: str, left: Sequence[Row]) -> tuple[str | None, Verdict]:
        """Return why a stage is skipped, or None, and what it decides."""
        if stage not in self._stages:
            return "left out by --stages", Verdict(frozenset())
        if stage == "caption":
            return self._caption(left)
        if stage in BEST and (reason := self._score(left).get(stage)):
            return reason, Verdict(frozenset())
        return None, selection.judge(stage, left, self._config.select, self._embeddings)

    def _score(self, rows: Sequence[Row]) -> Mapping[str, str]:
        """Add to the rows what the vision models say of them; return stage -> why there are no models for it."""
        unscored = [row for row in rows if row["id"] not in self._scored]
        if not unscored and self._missing is not None:
            return self._missing
        with tqdm(total=len(unscored), desc="features", unit="clip", delay=1) as bar:
            scored = scoring.score_clips(
                self._vision,
                unscored,
                paths={source.name: source.path for source in self._sources.values()},
                identities=self._identities,
                store=self._store,
                on_progress=bar.update,
            )
        for row in unscored:
            row["scores"] |= scored.scores.get(row["id"], {})
        self._scored |= {row["id"] for row in unscored}
        self._embeddings |= scored.embeddings
        self._missing = scored.missing
        return scored.missing

    def _caption(self, left: Sequence[Row]) -> tuple[str | None, Verdict]:
        settings = self._config.caption
        given = {row["id"]: caption for row in left if (caption := self._sources[row["source"]].caption)}
        if self._captioner:
            given = given if settings.keep_given else {}
        elif not given:
            idle = "; config.caption.held_out was compared with nothing" if settings.held_out else ""
            return f"no config.caption.endpoint, and no captions came with the videos{idle}", Verdict(frozenset())
        outcomes = {name: (Outcome(SUCCESS, caption), GIVEN) for name, caption in given.items()}
        others = [row for row in left if row["id"] not in given]
        if self._captioner:
            outcomes |= {name: (outcome, settings.model) for name, outcome in self._asked(others).items()}
        else:
            none = Outcome(ERROR, reason="no caption came with the video, and there is no config.caption.endpoint")
            outcomes |= {row["id"]: (none, None) for row in others}
        takes = {SUCCESS, TRUNCATED} if settings.keep_truncated else {SUCCESS}
        taken = {name: outcome.text for name, (outcome, _) in outcomes.items() if outcome.outcome in takes}
        lists = listed(settings.held_out)
        alike = held_out(taken, lists)
        for row in left:
            outcome, by = outcomes[row["id"]]
            said = {"outcome": outcome.outcome, "text": outcome.text, "reason": outcome.reason, "by": by}
            if row["id"] in alike:
                said |= {"outcome": HELD_OUT, "reason": alike[row["id"]]}
            row["caption"] = said
        kinds = (SUCCESS, TRUNCATED, BLOCKED, ERROR, *([HELD_OUT] if lists else []))
        counts = {kind: sum(row["caption"]["outcome"] == kind for row in left) for kind in kinds}
        refused = [row for row in left if row["caption"]["outcome"] not in takes]
        reasons = Counter(row["caption"]["reason"] for row in refused)
        most = [{"reason": reason, "clips": count} for reason, count in reasons.most_common(MOST_REASONS)]
        details = {"outcomes": counts, "reasons": most}
        return None, Verdict(frozenset(row["id"] for row in refused), details=details)

    def _asked(self, rows: Sequence[Row]) -> dict[str, Outcome]:
        """Return the captions of clips; those that failed are not kept, so that the next command asks again."""
        said, outcomes, missing, hopeless = self._captioner.made_from(), {}, [], None
        made_from = {row["id"]: {**self._identities[row["source"]], **said} for row in rows}
        for row in rows:
            kept = self._store.get(CAPTIONS, row["id"], made_from[row["id"]])
            if kept:
                outcomes[row["id"]] = Outcome(**kept)
            else:
                missing.append(row)
        sent = {name: self._config.caption[name] for name in ("height", "fps")}
        clips = ((row["id"], clip_reader(self._sources[row["source"]].path, row, **sent)) for row in missing)
        with tqdm(total=len(missing), desc="captions", unit="clip", disable=not missing) as bar:
            for name, outcome in ask_all(self._captioner, clips, concurrency=self._config.caption.concurrency):
                outcomes[name] = outcome
                bar.update()
                if outcome.hopeless:
                    hopeless = outcome.reason
                if outcome.outcome != ERROR:
                    kept = {"outcome": outcome.outcome, "text": outcome.text, "reason": outcome.reason}
                    self._store.put(CAPTIONS, name, made_from[name], kept)
        if rows and all(outcome.outcome == ERROR for outcome in outcomes.values()):
            hopeless = hopeless or Counter(outcome.reason for outcome in outcomes.values()).most_common(1)[0][0]
        if hopeless:
            self.failure = f"{hopeless}; the rest is done, the same command asks again"
        return outcomes

    def _pictures(self, rows: Sequence[Row]) -> dict[str, bytes]:
        """Return clip's id -> a small JPEG, of those that can be read."""
        width, limits = self._config.report.picture_width, self._config.limits
        pictures, missing = {}, []
        made_from = {row["id"]: {**self._identities[row["source"]], "width": width} for row in rows}
        for row in rows:
            kept = self._store.get(PICTURES, row["id"], made_from[row["id"]])
            if kept:
                pictures[row["id"]] = base64.b64decode(kept)
            else:
                middle = (row["start"] + row["end"]) / 2
                arguments = [str(self._sources[row["source"]].path), middle, row["size"], width]
                missing.append((row["id"], arguments))
        if not missing:
            return pictures
        workers = min(self._workers, len(missing))
        with tqdm(total=len(missing), desc="pictures", unit="clip") as bar:
            for name, picture, _ in run_pool(
                THUMBNAIL, missing, workers=workers, seconds=limits.seconds, memory_gib=limits.memory_gib
            ):
                bar.update()
                if picture:
                    self._store.put(PICTURES, name, made_from[name], picture)
                    pictures[name] = base64.b64decode(picture)
        return pictures


BROKEN = {"error": "was not analysed", "broke": True}


def _lines(rows: Iterable[Mapping]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
