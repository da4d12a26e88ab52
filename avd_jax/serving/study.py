"""A blind study: pairs of methods' videos of the same prompt and seed, in an order and on sides that tell nothing.

Order and sides follow from the study's seed and the annotator, so that a reload or a restart does not change them.
Everybody gets the pairs with the fewest votes first, until each has as many as are wanted.
"""

import datetime
import hashlib
import hmac
import json
import random
import re
import secrets
import threading
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from avd_jax.errors import UserError
from avd_jax.experiments.video_sets import Shown, matched, read_set
from avd_jax.paths import local_path
from avd_jax.serving.server import App, Reply, as_json, static, text_field
from avd_jax.serving.vote_report import results_page
from avd_jax.serving.votes import COMPARABLE, QUESTIONS, Study, VoteFile, VoteLine

MOST_NAME = 60  # characters of an annotator's name
SIDES = ("first", "second")
_METHOD = re.compile(r"[\w .+-]{1,40}")


@dataclass(frozen=True)
class Pair:
    """Videos of two methods that show the same.

    Attributes:
      name: in the file of votes.
      prompt, seed: of both.
      files: method -> video.
    """

    name: str
    prompt: str
    seed: int | None
    files: dict[str, Path]


def named_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """Return what `A=DIR_A B=DIR_B ...` says (UserError if it says something else)."""
    folders: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or not folder or not _METHOD.fullmatch(name) or name == COMPARABLE:
            raise UserError(
                f"--compare {argument}: write NAME=FOLDER, as in ours=out/a, the name of letters and digits"
            )
        if name in folders:
            raise UserError(f"--compare {argument}: there are two methods of the name {name}; give each its own")
        folders[name] = local_path(folder)
        same = next((other for other in folders if folders[other].resolve() == folders[name].resolve()), name)
        if same != name:
            raise UserError(f"--compare {argument}: is the folder of {same} too; give each method its own")
    if len(folders) < 2:
        raise UserError("--compare: give two methods at least, as in --compare ours=out/a theirs=out/b")
    return folders


def pairs_of(sets: Mapping[str, Sequence[Shown]]) -> list[Pair]:
    """Return each two videos of different methods that show the same.

    Raises:
      UserError: two methods have nothing in common.
    """
    pairs, common = [], Counter()
    for row in matched(sets):
        for two in combinations([name for name in sets if name in row.videos], 2):
            told = json.dumps([*row.key, sorted(two)])
            files = {method: row.videos[method].file for method in two}
            pairs.append(Pair(hashlib.sha256(told.encode()).hexdigest()[:16], row.text, row.seed, files))
            common[two] += 1
    for two in combinations(sets, 2):
        if not common[two]:
            raise UserError(
                f"--compare: {two[0]} and {two[1]} have no video in common, neither by prompt and seed in the .json "
                "beside it nor by file name; make them with the same --prompts and --seed"
            )
    return pairs


class BlindStudy:
    """The pairs, their votes, and what the page asks for."""

    def __init__(self, folders: Mapping[str, Path], votes: Path, *, seed: int, per_pair: int):
        """Match the videos, and open the file of votes or begin it.

        Args:
          folders: method -> folder of its videos.
          votes: the file; one that is there is continued.
          seed: decides order and sides.
          per_pair: people who should vote on each pair.

        Raises:
          UserError: folders without common videos, or a file of another study.
        """
        if per_pair < 1:
            raise UserError(f"--per_pair {per_pair}: give at least 1")
        self.pairs = {pair.name: pair for pair in pairs_of({name: read_set(path) for name, path in folders.items()})}
        self.file = VoteFile(votes, Study(list(folders), seed, secrets.token_hex(16)))
        self.per_pair, study = per_pair, self.file.study
        if set(study.methods) != set(folders) or study.seed != seed:
            raise UserError(
                f"--votes {votes}: is of a study of {', '.join(study.methods)} with --seed {study.seed}; continue that "
                "one, or give another file"
            )
        self._lock = threading.Lock()
        self._shown: dict[str, str] = {}  # annotator -> the pair that is on their page
        self._skipped: set[tuple[str, str]] = set()
        self._pairs_by_token = {self._token(name): pair for name, pair in self.pairs.items()}
        self._videos = {
            self._token(name, method): file for name, pair in self.pairs.items() for method, file in pair.files.items()
        }

    @property
    def report_name(self) -> str:
        """The path of the page of results, which only who started the server knows."""
        return f"results-{self._token('results')}"

    def app(self) -> App:
        """Return what the server answers."""
        pages = {"": "vote.html", **{name: name for name in ("vote.js", "page.js", "page.css")}}
        get = {path: static(name) for path, name in pages.items()}
        get["v"] = lambda token: Reply(self._videos[token]) if token in self._videos else None
        get["about"] = lambda rest: as_json({"questions": QUESTIONS, "pairs": len(self.pairs)})
        get[self.report_name] = lambda rest: Reply(
            results_page(self.file, expected=set(self.pairs), per_pair=self.per_pair).encode(), "text/html"
        )
        return App(get, {"next": self.next, "vote": self.vote, "skip": self.skip})

    def next(self, posted: Mapping) -> dict:
        """Return what an annotator is to look at: a pair's token, prompt and videos, and how far they are."""
        annotator = annotator_of(posted)
        votes = self.file.votes()
        counts = Counter(vote.pair for vote in votes)
        done = {vote.pair for vote in votes if vote.annotator == annotator and vote.pair in self.pairs}
        order = list(self.pairs)
        self._random(annotator).shuffle(order)
        with self._lock:
            left = [
                name
                for name in order
                if name not in done
                and (counts[name] < self.per_pair or name == self._shown.get(annotator))
                and (annotator, name) not in self._skipped
                and all(file.is_file() for file in self.pairs[name].files.values())
            ]
            progress = {"done": len(done), "of": len(done) + len(left)}
            if not left:
                return progress
            if self._shown.get(annotator) not in left:
                self._shown[annotator] = min(left, key=counts.__getitem__)
            name = self._shown[annotator]
        videos = [f"v/{self._token(name, method)}" for method in self.sides(annotator, name)]
        pair = {"pair": self._token(name), "prompt": self.pairs[name].prompt, "videos": videos}
        return progress | pair

    def vote(self, posted: Mapping) -> dict:
        """Keep a vote, and return the next pair once it is on the disk."""
        annotator, pair = annotator_of(posted), self._pair_of(posted)
        methods = self.sides(annotator, pair.name)
        meaning = dict(zip(SIDES, methods, strict=True)) | {COMPARABLE: COMPARABLE}
        answers = {}
        for question, text in QUESTIONS.items():
            answer = posted.get(question)
            if not isinstance(answer, str) or answer not in meaning:
                raise UserError(f"answer both questions; this one is open: {text}")
            answers[question] = meaning[answer]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        shown = {"pair": pair.name, "prompt": pair.prompt, "seed": pair.seed, "methods": list(methods)}
        self.file.append(VoteLine(**shown, annotator=annotator, **answers, time=now))
        return self.next(posted)

    def skip(self, posted: Mapping) -> dict:
        """Leave a pair out for an annotator whose browser cannot play it, until the server is started again."""
        with self._lock:
            self._skipped.add((annotator_of(posted), self._pair_of(posted).name))
        return self.next(posted)

    def sides(self, annotator: str, pair: str) -> tuple[str, str]:
        """Return the two methods of a pair as this annotator sees them, first and second video."""
        methods = sorted(self.pairs[pair].files)
        self._random(annotator, pair).shuffle(methods)
        return tuple(methods)

    def _pair_of(self, posted: Mapping) -> Pair:
        token = posted.get("pair")
        pair = self._pairs_by_token.get(token) if isinstance(token, str) else None
        if pair is None:
            raise UserError("this pair is not part of the study any more; reload the page")
        return pair

    def _random(self, *told: str) -> random.Random:
        return random.Random(json.dumps([self.file.study.seed, *told]))

    def _token(self, *told: str) -> str:
        key = bytes.fromhex(self.file.study.key)
        return hmac.new(key, json.dumps(told).encode(), hashlib.sha256).hexdigest()[:32]


def annotator_of(posted: Mapping) -> str:
    """Return the name that was posted; case, spaces and the way in which accents are written do not count."""
    name = text_field(posted, "annotator", MOST_NAME, what="your name")
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())
