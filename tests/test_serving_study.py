"""A blind study through its server: what voters see, what is kept, and what comes out."""

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_serving_server import ask, serving

from avd_jax.errors import UserError
from avd_jax.serving.study import BlindStudy, named_folders
from avd_jax.serving.vote_report import results, results_page, results_text, write_results
from avd_jax.serving.votes import COMPARABLE, VoteFile

METHODS = ("adaptive", "dmd", "teacher")
PROMPTS = ("a dog", "<script>alert(1)</script>", "a cat")


@pytest.fixture
def folders(tmp_path):
    for method in METHODS:
        (tmp_path / method).mkdir()
        for i, prompt in enumerate(PROMPTS):
            file = tmp_path / method / f"{i}-{method}.mp4"
            file.write_bytes(f"{method} {i}".encode())
            file.with_suffix(".json").write_text(json.dumps({"prompt": prompt, "seed": i}))
    return {method: tmp_path / method for method in METHODS}


def study_of(folders, name="votes.jsonl", **options):
    votes = next(iter(folders.values())).parent / name
    return BlindStudy(folders, votes, **{"seed": 0, "per_pair": 2, **options})


def methods_seen(server, pair):
    """Which methods the videos of a page are of; their content tells it here."""
    return [ask(server, f"/{video}")[1].decode().split()[0] for video in pair["videos"]]


def vote_all(server, annotator, prefer):
    """Vote on everything; `prefer` chooses among the methods of a pair, or says COMPARABLE."""
    votes, pair = 0, json.loads(ask(server, "/next", {"annotator": annotator})[1])
    while "pair" in pair:
        seen = methods_seen(server, pair)
        choice = prefer(seen)
        answer = COMPARABLE if choice == COMPARABLE else ("first", "second")[seen.index(choice)]
        posted = {"annotator": annotator, "pair": pair["pair"], "quality": answer, "agreement": COMPARABLE}
        status, content, _ = ask(server, "/vote", posted)
        assert status == 200, content
        votes, pair = votes + 1, json.loads(content)
    return votes


def best(seen):
    return min(seen)  # adaptive, then dmd, then teacher


def test_two_people_and_three_methods_end_in_the_right_table(folders, tmp_path):
    study = study_of(folders)
    with serving(study.app()) as server:
        assert vote_all(server, "Ann", best) == 9
        assert vote_all(server, "ben", lambda seen: COMPARABLE if "teacher" in seen else best(seen)) == 9
        assert vote_all(server, "too late", best) == 0
        status, page, _ = ask(server, f"/{study.report_name}")
    found = results(VoteFile(tmp_path / "votes.jsonl"))
    wins = {pair: one.by_vote[1].value for pair, one in found["quality"].items()}
    assert wins == {("adaptive", "dmd"): 1.0, ("adaptive", "teacher"): 0.5, ("dmd", "teacher"): 0.5}
    majorities = {pair: one.by_majority[0].value for pair, one in found["quality"].items()}
    assert majorities == {("adaptive", "dmd"): 0.0, ("adaptive", "teacher"): 1.0, ("dmd", "teacher"): 1.0}
    assert all(one.by_vote[0].value == 1 for one in found["agreement"].values())
    assert status == 200
    assert "18 votes of 2 people on 9 pairs" in page.decode()
    assert "9 of 9 pairs have 2 votes or more" in page.decode()
    assert "adaptive better 100%" in page.decode()
    text = results_text(study.file)
    assert re.search(r"adaptive : dmd +3 +6 +100% \(44% to 100%\), 0% ", text)
    write_results(study.file, tmp_path / "report.html")
    assert "adaptive better 100%" in (tmp_path / "report.html").read_text()


def test_nothing_tells_the_method(folders):
    study = study_of(folders)
    with serving(study.app()) as server:
        replies = [ask(server, path) for path in ("/", "/vote.js", "/about", "/page.css")]
        pairs = [ask(server, "/next", {"annotator": str(i)}) for i in range(6)]
        videos = [ask(server, f"/{video}") for _, body, _ in pairs for video in json.loads(body)["videos"]]
    told = [str((body, headers)) for _, body, headers in replies + pairs] + [str(headers) for *_, headers in videos]
    names = [*METHODS, *(file.stem for folder in folders.values() for file in folder.iterdir()), 'mp4"', "jsonl"]
    assert not [(name, text) for text in told for name in names if name in text]
    assert all("Last-Modified" not in headers and "ETag" not in headers for *_, headers in videos)
    tokens = [video for _, body, _ in pairs for video in json.loads(body)["videos"]]
    assert all(re.fullmatch(r"v/[0-9a-f]{32}", token) for token in tokens)


def test_order_and_sides_are_random_and_stay(folders):
    study, again = study_of(folders), study_of(folders)
    people = [f"person {i}" for i in range(200)]
    shown = {name: study.next({"annotator": name}) for name in people}
    assert shown == {name: again.next({"annotator": name}) for name in people}, "a reload, and another server"
    assert shown["person 7"] == study.next({"annotator": " PERSON  7"})
    pair = next(iter(study.pairs))
    firsts = [study.sides(name, pair)[0] for name in people]
    assert 70 < firsts.count(min(firsts)) < 130
    assert len({entry["pair"] for entry in shown.values()}) == 9
    other = study_of(folders, "other.jsonl", seed=1)
    assert [study.sides(name, pair) for name in people] != [other.sides(name, pair) for name in people]


def test_an_annotator_resumes_where_they_were(folders):
    study = study_of(folders)
    first = study.next({"annotator": "ann"})
    answers = {"annotator": "ann", "quality": "first", "agreement": "second"}
    second = study.vote({"pair": first["pair"], **answers})
    assert (second["done"], second["of"]) == (1, 9)
    assert study.vote({"pair": first["pair"], **answers, "quality": "second"}) == second, "sent twice"
    (kept,) = study.file.votes()
    assert (kept.quality, kept.agreement) == tuple(kept.methods)
    assert study_of(folders).next({"annotator": "ann"})["done"] == 1
    skipped = study.skip({"annotator": "ann", "pair": second["pair"]})
    assert skipped["pair"] not in (first["pair"], second["pair"])


def test_every_pair_gets_its_votes_before_one_gets_more(folders):
    study, drawn = study_of(folders, per_pair=3), random.Random(0)
    counts = dict.fromkeys(study.pairs, 0)
    for i in range(27):
        shown = study.next({"annotator": f"person {i}"})
        study.vote(
            {
                "annotator": f"person {i}",
                "pair": shown["pair"],
                "quality": "first",
                "agreement": drawn.choice(["first", "second", COMPARABLE]),
            }
        )
        counts[study.file.votes()[-1].pair] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
    assert set(counts.values()) == {3}
    assert "pair" not in study.next({"annotator": "late"})


def test_voters_at_once_lose_no_vote(folders, tmp_path):
    with serving(study_of(folders, per_pair=8).app()) as server, ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(lambda name: vote_all(server, name, best), ["ann", "ben", "carl", "dora"])) == 36
    votes = VoteFile(tmp_path / "votes.jsonl").votes()
    assert len({(vote.annotator, vote.pair) for vote in votes}) == 36
    assert all(vote.quality == min(vote.methods) for vote in votes)


def test_what_voters_type_is_a_message(folders):
    study = study_of(folders)
    shown = study.next({"annotator": "<script>"})
    vote = {"annotator": "a", "pair": shown["pair"], "quality": "first", "agreement": "first"}
    for posted, message in (
        ({**vote, "annotator": ""}, "your name is missing"),
        ({**vote, "annotator": "x" * 100_000}, "100,000 characters"),
        ({**vote, "pair": "../votes.jsonl"}, "not part of the study"),
        ({**vote, "pair": ["x"]}, "not part of the study"),
        ({**vote, "quality": "adaptive"}, "answer both questions"),
        ({**vote, "agreement": ["first"]}, "answer both questions"),
    ):
        with pytest.raises(UserError, match=message):
            study.vote(posted)
    assert study.file.votes() == []


def test_videos_that_vanish_are_not_asked_about(folders):
    study = study_of(folders)
    for file in folders["dmd"].glob("*.mp4"):
        file.unlink()
    assert study.next({"annotator": "a"})["of"] == 3
    with serving(study.app()) as server:
        gone = next(token for token, file in study._videos.items() if not file.is_file())
        assert ask(server, f"/v/{gone}")[0] == 404


def test_bad_folders_and_files_are_one_line(folders, tmp_path):
    for arguments, message in (
        (["a=x"], "two methods at least"),
        (["a", "b=y"], "write NAME=FOLDER"),
        (["a=x", "a=y"], "two methods of the name a"),
        (["comparable=x", "a=y"], "write NAME=FOLDER"),
        (["<b>=x", "a=y"], "write NAME=FOLDER"),
    ):
        with pytest.raises(UserError, match=message):
            named_folders(arguments)
    (tmp_path / "linked").symlink_to(folders["dmd"])
    with pytest.raises(UserError, match=r"--compare b=.*linked: is the folder of a too; give each method its own"):
        named_folders([f"a={folders['dmd']}", f"b={tmp_path / 'linked'}"])
    assert named_folders(["a=x=y", "b=~/z"]) == {"a": Path("x=y"), "b": Path.home() / "z"}
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "other.mp4").write_bytes(b"")
    with pytest.raises(UserError, match="adaptive and strange have no video in common"):
        study_of({"adaptive": folders["adaptive"], "strange": tmp_path / "strange"})
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        study_of({**folders, "x": tmp_path / "nowhere"})
    study_of(folders)
    with pytest.raises(UserError, match=r"is of a study of adaptive, dmd, teacher with --seed 0"):
        study_of(folders, seed=3)
    assert "No votes yet" in results_page(VoteFile(tmp_path / "votes.jsonl"))
