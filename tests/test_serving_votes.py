"""The file of votes: appended by several at once, whole after a kill, in a full disk's way of failing too."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from avd_jax.errors import UserError
from avd_jax.serving.votes import COMPARABLE, Study, VoteFile, VoteLine

STUDY = Study(["A", "B"], 0, "00")
VOTE = VoteLine("p", "a dog ü", 3, ["B", "A"], "ann", "A", COMPARABLE, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def path(tmp_path):
    VoteFile(tmp_path / "votes.jsonl", STUDY)
    return tmp_path / "votes.jsonl"


def test_a_vote_is_there_again(path):
    file = VoteFile(path, Study(["other"], 1, "11"))
    assert file.study == STUDY, "the study that began the file"
    assert file.append(VOTE)
    assert VoteFile(path).votes() == [VOTE]


def test_the_first_vote_of_a_person_on_a_pair_counts(path):
    here, there = VoteFile(path), VoteFile(path)
    assert here.append(VOTE)
    assert not there.append(replace(VOTE, quality="B"))
    assert there.votes() == here.votes() == [VOTE]
    assert there.append(replace(VOTE, annotator="ben"))
    assert len(here.votes()) == 2


def test_several_at_once_lose_no_vote(path):
    """Threads of one server share a file; another server has opened it too, and its lock is another one."""
    servers = [VoteFile(path), VoteFile(path)]

    def vote(i):
        return servers[i % 2].append(replace(VOTE, annotator=str(i % 8), pair=str(i // 8)))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(vote, range(160)))
    assert len({(vote.annotator, vote.pair) for vote in VoteFile(path).votes()}) == 160
    assert servers[0].votes() == servers[1].votes()
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("cut", [2, 5, 60])
def test_a_half_written_last_line_was_never_confirmed(path, cut):
    VoteFile(path).append(VOTE)
    line = json.dumps(asdict(replace(VOTE, annotator="ben"))).encode() + b"\n"
    with path.open("ab") as file:
        file.write(line[:-cut])
    assert VoteFile(path).votes() == [VOTE]
    carl = replace(VOTE, annotator="carl")
    assert VoteFile(path).append(carl)
    assert VoteFile(path).votes() == [VOTE, carl]


def test_a_last_line_that_only_lacks_its_end_is_a_vote_and_stays(path, monkeypatch):
    VoteFile(path).append(VOTE)
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))  # as an editor may leave it
    before, write, carl = path.read_bytes(), os.write, replace(VOTE, annotator="carl")
    file = VoteFile(path)
    assert file.votes() == file.votes() == [VOTE]
    monkeypatch.setattr(os, "write", lambda to, data: write(to, data[:10]))
    with pytest.raises(UserError, match="No space left"):
        file.append(carl)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert file.append(carl)
    assert file.votes() == VoteFile(path).votes() == [VOTE, carl]


@pytest.mark.parametrize("content", ['{"seed": 3}', "a note", '"text"', "\n"])
def test_a_file_that_is_not_of_votes_is_left_alone(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(UserError, match="1: does not say of which study"):
        VoteFile(file, STUDY)
    assert file.read_text() == content


def test_a_disk_that_is_full_keeps_nothing_of_a_vote(path, monkeypatch):
    file, before, write = VoteFile(path), path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda to, data: write(to, data[:10]))
    with pytest.raises(UserError, match="No space left"):
        file.append(VOTE)
    assert path.read_bytes() == before
    monkeypatch.undo()
    assert file.append(VOTE)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no votes"),
        ("hello\n", "1: does not say of which study"),
        ("STUDY\n{}\n", "2: is no vote"),
        ("STUDY\nVOTE\n" + json.dumps(asdict(replace(VOTE, methods=["A", "C"]))) + "\n", "3: is of methods"),
        ("STUDY\n" + json.dumps(asdict(replace(VOTE, quality="C"))) + "\n", "2: is no vote"),
    ],
)
def test_what_is_no_file_of_votes_is_one_line(tmp_path, content, message):
    file = tmp_path / "votes.jsonl"
    study = json.dumps({"study": asdict(STUDY)})
    file.write_text(content.replace("STUDY", study).replace("VOTE", json.dumps(asdict(VOTE))))
    with pytest.raises(UserError, match=message):
        VoteFile(file)


def test_a_file_that_goes_away_under_the_server(path):
    file = VoteFile(path)
    path.write_text("")
    with pytest.raises(UserError, match="has become shorter"):
        file.append(VOTE)
    path.unlink()
    with pytest.raises(UserError, match="is gone"):
        file.votes()
