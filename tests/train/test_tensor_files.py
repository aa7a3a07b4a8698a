"""Tensor files are written and read without copies; the safetensors library holds both directions."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from numpy.testing import assert_array_equal

from skyjax.errors import UserError
from skyjax.train.weights import read_safetensors, write_safetensors

TENSORS = {
    "bytes": np.arange(5, dtype=np.uint8),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "none": np.zeros((0, 3), np.float32),
    "half": np.array([1.5, -2], ml_dtypes.bfloat16),
    "one": np.float32(7).reshape(()),
    "index": np.arange(4).reshape(2, 2),
    "flags": np.array([True, False]),
    "jax": jnp.arange(3.0),
}


def assert_same(got, want):
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert_array_equal(got, want)


def test_the_library_reads_what_is_written(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, metadata={"format": "pt"})
    for name, value in safetensors.numpy.load_file(path).items():
        assert_same(value, TENSORS[name])
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.offset_keys() == ["index", "turned", "none", "one", "jax", "half", "bytes", "flags"]
    theirs = safetensors.torch.load_file(path)  # refuses tensors that are not aligned
    assert theirs.keys() == TENSORS.keys()
    assert theirs["half"].dtype == torch.bfloat16
    assert_array_equal(theirs["turned"].numpy(), TENSORS["turned"])


def test_what_the_library_writes_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    plain = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in TENSORS.items()}
    safetensors.numpy.save_file(plain, path)
    got = read_safetensors(path)
    assert got.keys() == TENSORS.keys()
    for name, value in got.items():
        assert_same(value, TENSORS[name])
    safetensors.numpy.save_file({"none": np.zeros((0, 3), np.float32)}, path)
    assert_same(read_safetensors(path)["none"], TENSORS["none"])
    safetensors.numpy.save_file({}, path)
    assert read_safetensors(path) == {}


def test_a_file_may_be_written_over_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.arange(100_000.0)})
    got = read_safetensors(path)
    write_safetensors(path, {"a": got["a"] * 2})
    assert_array_equal(got["a"], np.arange(100_000.0))
    assert_array_equal(read_safetensors(path)["a"], np.arange(100_000.0) * 2)


def test_damaged_files_and_strange_types_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS)
    whole = path.read_bytes()
    for damaged in (b"", whole[:6], whole[:-1], whole + b"0", whole[:8] + b"x" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r'x.safetensors" cannot be read: .*; copy it anew'):
            read_safetensors(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_safetensors(tmp_path / "nothing.safetensors")
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, path)
    with pytest.raises(UserError, match=r'x.safetensors" holds a type that is not read here: F8_E4M3'):
        read_safetensors(path)
    with pytest.raises(UserError, match='"a" is of the type complex64, for which safetensors has no name'):
        write_safetensors(path, {"a": np.zeros(2, np.complex64)})
