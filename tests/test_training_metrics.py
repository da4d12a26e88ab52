"""metrics.jsonl, TensorBoard and the lines on the terminal."""

import json
import math

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from avd_jax.training.metrics import MetricsWriter


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, steps, *, first_step=0, value=1.0):
    writer = MetricsWriter(workdir, first_step=first_step, num_steps=10)
    for step in steps:
        writer.write(step, {"loss/generator": value * step, "time/step_seconds": 0.5})
    writer.close()


def events(workdir):
    """Return (step, tag) of every event, read from the records' framing: length, checksum, payload, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").glob("events*")):
        data, position = path.read_bytes(), 0
        while position < len(data):
            length = int.from_bytes(data[position : position + 8], "little")
            event = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
            found += [(event.step, value) for value in event.summary.value]
            position += 16 + length
    return found


def test_lines(tmp_path, capsys):
    write(tmp_path, [1, 2])
    assert lines(tmp_path) == [
        {"step": step, "loss/generator": float(step), "time/step_seconds": 0.5} for step in (1, 2)
    ]
    assert capsys.readouterr().out.splitlines()[1] == "step 2/10  generator 2  0.50 s/step"
    assert [(step, value.tag) for step, value in events(tmp_path) if value.tag == "loss/generator"] == [
        (1, "loss/generator"),
        (2, "loss/generator"),
    ]


def test_what_was_logged_behind_the_checkpoint_is_dropped(tmp_path):
    write(tmp_path, [1, 2, 3])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss/gen')  # a kill cut the line off
    write(tmp_path, [3, 4], first_step=2, value=10.0)
    assert [(line["step"], line["loss/generator"]) for line in lines(tmp_path)] == [(1, 1), (2, 2), (3, 30), (4, 40)]


def test_a_cut_line_before_the_checkpoint_is_no_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n[]\n{"step": "1"}\n\n{"step": 2}\n')
    write(tmp_path, [3], first_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_keep_the_file_json(tmp_path, value):
    write(tmp_path, [1], value=value)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["loss/generator"] is None


def test_videos(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=0, num_steps=1)
    video = np.linspace(-1, 1, 3 * 4 * 6 * 3).reshape(3, 4, 6, 3)
    writer.video("samples/0", 1, video, fps=8)
    writer.close()
    (value,) = [value for _, value in events(tmp_path) if value.tag == "samples/0"]
    assert (value.image.height, value.image.width) == (4, 6)
    assert value.image.encoded_image_string.startswith(b"GIF")
