"""Reading .pth files: exact tensors, no code of theirs, one line for what is broken."""

import pickle
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from avd_jax.convert.pth import PthFile
from avd_jax.errors import UserError

FIXTURES = Path(__file__).parent / "fixtures"
BASE = (np.arange(48, dtype=np.float32) / 7).reshape(6, 8)  # as in make_pth_fixture.py


def test_every_kind_of_tensor_is_read_exactly():
    tensors = PthFile(FIXTURES / "state_dict.pth").state_dict(None)
    expected = {
        "parameter": BASE,
        "transposed": BASE.T,
        "window": BASE[1:3, 2:5],
        "scalar": np.asarray(3, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "half": BASE.astype(np.float16),
        "bfloat16": BASE.astype(ml_dtypes.bfloat16),
        "flags": np.arange(4) > 1,
    }
    assert list(tensors.leaves) == list(expected)
    for key, array in expected.items():
        found = tensors.read(key)
        assert (found.dtype, found.shape) == (array.dtype, array.shape) == (tensors.leaves[key].dtype, array.shape)
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("key", ["parameter", "transposed", "window", "half", "flags"])
def test_some_rows(key, monkeypatch):
    tensors, read = PthFile(FIXTURES / "state_dict.pth").state_dict(None), []
    whole = tensors.read(key)
    inside = tensors._bytes
    monkeypatch.setattr(tensors, "_bytes", lambda start, count: read.append(count) or inside(start, count))
    found = tensors.read(key, (1, 2))
    np.testing.assert_array_equal(found[1], whole[1])
    assert (found.shape, found.dtype) == (whole.shape, whole.dtype)
    assert key == "transposed" or read == [whole[1].nbytes]


def test_several_state_dicts_by_name():
    file = PthFile(FIXTURES / "group_dicts.pt")
    assert file.groups == ["generator", "critic"]
    np.testing.assert_array_equal(file.state_dict("critic").read("w"), BASE + 1)


class _Call:
    """Pickles as a call, as an attack would."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


def write(path, content, **members):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


@pytest.mark.parametrize("function", [eval, getattr, Path.unlink, pickle.loads])
def test_code_is_refused_and_not_run(tmp_path, function):
    evidence = tmp_path / "evidence"
    evidence.touch()
    arguments = (evidence,) if function is Path.unlink else ("1 + 1",)
    path = write(tmp_path / "evil.pth", {"w": _Call(function, *arguments)})
    with pytest.raises(UserError, match=r"evil\.pth: holds more than tensors, and its code is not run \("):
        PthFile(path)
    assert evidence.exists()


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_truncated(tmp_path, kept):
    whole = (FIXTURES / "state_dict.pth").read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=r"cut\.pth: truncated, or no PyTorch file"):
        PthFile(path)


@pytest.mark.parametrize("name", ["state_dict.pth", "clip_script.pt"])
def test_garbled_bytes_never_give_another_error(name, tmp_path):
    whole = (FIXTURES / name).read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "garbled.pth"
    for _ in range(100):
        garbled = bytearray(whole)
        for position in random.integers(len(whole), size=5):
            garbled[position] = random.integers(256)
        path.write_bytes(garbled)
        try:
            file = PthFile(path)
            for group in file.groups or [None]:
                tensors = file.state_dict(group)
                for key in tensors.leaves:
                    tensors.read(key)
        except UserError:
            pass


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (FIXTURES / "old_format.pth", "before 1.6"),
        (FIXTURES / "absent.pth", "no such file"),
    ],
)
def test_other_files(path, message):
    with pytest.raises(UserError, match=message):
        PthFile(path)


def test_what_is_no_state_dict(tmp_path):
    with pytest.raises(UserError, match="holds a list"):
        PthFile(write(tmp_path / "list.pth", [1, 2]))
    with pytest.raises(UserError, match=r"holds no state dict .* it has 'step'"):
        PthFile(write(tmp_path / "numbers.pth", {"step": 5}))
    with pytest.raises(UserError, match="big-endian"):
        PthFile(write(tmp_path / "big.pth", {}, byteorder="big"))
