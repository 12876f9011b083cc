"""What tells one file of weights from another without reading all of it."""

import io
import os

import pytest
import safetensors.torch
import torch

from steer import identity
from steer.identity import file_hash

SIZES = {"a": 40_000, "b": 3, "c": 20_000}


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", 10_000)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def hashed(path, weights, **notes):
    safetensors.torch.save_file(weights, path, notes or None)
    return file_hash(path)


def test_what_training_or_a_tool_changes_is_seen(weights, tmp_path):
    file = tmp_path / "x.safetensors"
    own = hashed(file, weights)
    assert hashed(file, weights) == own
    changed = [
        {**weights, "b": weights["b"] + 1},  # the smallest tensor of all
        {**weights, "c": weights["c"] * 1.001},  # one layer, as a merged LoRA changes it
        {**weights, "a": torch.cat([weights["a"][:-64], torch.ones(64)])},  # the last row
        {**weights, "a": weights["a"].bfloat16().float()},
        {"a2": weights["a"], **{k: v for k, v in weights.items() if k != "a"}},
    ]
    assert len({own, *(hashed(file, one) for one in changed)}) == 1 + len(changed)
    assert hashed(file, weights, version="2") != own


def test_what_is_missed_is_what_is_said(weights, tmp_path):
    """Values in the middle of a large tensor, by hand."""
    file = tmp_path / "x.safetensors"
    own = hashed(file, weights)
    weights["a"][20_000] += 1
    assert hashed(file, weights) == own
    assert 4 * SIZES["a"] > 2 * identity.PIECE


class Counting(io.FileIO):
    """A file that counts the bytes which are read from it."""

    total = 0

    def read(self, size=-1):
        found = super().read(size)
        Counting.total += len(found)
        return found

    def readinto(self, buffer):
        count = super().readinto(buffer)
        Counting.total += count
        return count


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_little_is_read_of_a_large_file(ending, tmp_path, monkeypatch):
    weights = {f"layer{i}": torch.zeros(2_000_000) for i in range(6)}
    safetensors.torch.save_file(weights, tmp_path / "x.safetensors")
    file = (tmp_path / "x.safetensors").rename(tmp_path / f"x.{ending}")
    if ending == "bin":
        file.write_bytes(b"PK\x03\x04\x00\x00\x08\x08" + file.read_bytes())  # as torch.save
    size = file.stat().st_size
    monkeypatch.setattr(type(file), "open", lambda self, mode: Counting(self, mode))

    def bytes_read(limit):
        monkeypatch.setattr(identity, "WHOLE", limit)
        monkeypatch.setattr(Counting, "total", 0)
        file_hash(file)
        return Counting.total

    assert bytes_read(size) == size
    most = 0.002 * size if ending == "safetensors" else identity.BLOCKS * identity.BLOCK + 8
    assert 0 < bytes_read(size - 1) <= most


@pytest.mark.parametrize(
    "start",
    [b"", b"\x00" * 8, (1 << 60).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]",
     (26).to_bytes(8, "little") + b'{"a":{"data_offsets":[-9]}',
     (36).to_bytes(8, "little") + b'{"a":{"data_offsets":[-90000,  20]}}'],
)  # fmt: skip
def test_a_file_that_is_no_weights_or_lies(start, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "WHOLE", 10_000)
    file = tmp_path / "x.safetensors"
    file.write_bytes(start + os.urandom(300_000))
    assert len(file_hash(file)) == 64
    one = file_hash(file)
    with file.open("r+b") as opened:
        opened.seek(-5, os.SEEK_END)
        opened.write(b"other")
    assert file_hash(file) != one


def test_the_hub_s_cache_names_a_large_file_by_its_hash(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / ("ab" * 32)).write_bytes(b"not read")
    (snapshot / "x.safetensors").symlink_to(blobs / ("ab" * 32))
    assert file_hash(snapshot / "x.safetensors") == "ab" * 32
    (blobs / ("ab" * 20)).write_bytes(b"{}")  # a small file's name is git's hash of it
    (snapshot / "config.json").symlink_to(blobs / ("ab" * 20))
    assert file_hash(snapshot / "config.json") != "ab" * 20
