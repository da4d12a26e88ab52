"""Our reader and writer against the safetensors library, and their shards."""

import json

import convert_cases as cases
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from avd_jax.convert.safetensors_io import SafetensorsFile, open_shards, write_safetensors
from avd_jax.errors import UserError


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.standard_normal((3, 5), dtype=np.float32),
        "half": rng.standard_normal((2, 2, 2)).astype(np.float16),
        "brain": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "double": rng.standard_normal((1, 2)),
        "count": np.array(12, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (array.dtype, array.shape)
        assert ours[key].tobytes() == array.tobytes()


def test_reads_what_the_library_writes(tensors, tmp_path):
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    same(cases.read_all(tmp_path / "a.safetensors"), tensors)


def test_writes_what_the_library_reads(tensors, tmp_path):
    cases.write_all(tmp_path, tensors, stem="a")
    same(safetensors.numpy.load_file(tmp_path / "a.safetensors"), tensors)
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_everything_once_and_none_is_too_large(tmp_path):
    tensors = {f"t{i}": np.full(10 + i, i, np.float32) for i in range(20)}
    cases.write_all(tmp_path, tensors, stem="model", shard_bytes=300)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    merged = {}
    for shard in shards:
        content = safetensors.numpy.load_file(shard)
        assert sum(array.nbytes for array in content.values()) <= 300
        assert not content.keys() & merged.keys()
        assert all(index["weight_map"][key] == shard.name for key in content)
        merged |= content
    same(merged, tensors)
    assert [file.path for file in open_shards(tmp_path / "model.safetensors.index.json")] == shards


def test_the_writer_holds_one_tensor_at_a_time(tmp_path):
    """Each tensor is asked for only when the one before it is in the file."""
    leaves = {f"t{i}": jax.ShapeDtypeStruct((1000,), np.dtype(np.float32)) for i in range(4)}
    sizes = []

    def stream():
        for key in leaves:
            sizes.append((tmp_path / "a.safetensors").stat().st_size if sizes else 0)
            yield key, np.ones(1000, np.float32)

    write_safetensors(tmp_path, leaves, stream(), stem="a", max_shard_bytes=10**9)
    assert sizes == sorted(sizes)
    assert sizes[-1] >= 2 * 4000


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 4]}}, "a has the dtype F4"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, "damaged: a has 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "truncated: "),
        ({"a": {"dtype": "F32", "shape": [1]}}, "its header is damaged"),
        (["a"], "its header is damaged"),
        *(
            (header, "its header is damaged")
            for header in (
                {"__metadata__": "no names"},
                {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
                {"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}},
                {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
                {"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}},
                {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}},
            )
        ),
    ],
)
def test_damaged_headers(header, message, tmp_path):
    encoded = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(4))
    with pytest.raises(UserError, match=message):
        SafetensorsFile(tmp_path / "a.safetensors")
