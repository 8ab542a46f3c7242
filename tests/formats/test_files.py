"""Safetensors files appear whole or not at all."""

import pytest
import torch

from otl.formats.files import read, whole, write


def test_read_gives_what_was_written(tmp_path):
    tensor = torch.arange(6).reshape(2, 3).T.float()  # not contiguous
    write(tmp_path / "a.safetensors", {"x": tensor}, {"title": "Größe"})
    tensors, header = read(tmp_path / "a.safetensors")
    assert torch.equal(tensors["x"], tensor) and header == {"title": "Größe"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), whole(path) as aside:
        aside.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_new_file_takes_the_place_of_the_old_one_in_one_step(tmp_path):
    path, reader = tmp_path / "a.safetensors", tmp_path / "reader"
    write(path, {"x": torch.zeros(1)}, {})
    reader.hardlink_to(path)  # A program that still has the old file open.
    write(path, {"x": torch.ones(1)}, {})
    assert read(reader)[0]["x"] == 0 and read(path)[0]["x"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"layer\.down would hold NaN or infinity"):
        write(tmp_path / "a.safetensors", {"layer.down": torch.tensor([1.0, value])}, {})
    assert not list(tmp_path.iterdir())


def test_header_fields_are_strings(tmp_path):
    with pytest.raises(ValueError, match="ss_network_dim"):
        write(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"ss_network_dim": 4})


def test_half_a_file_is_an_error_that_names_it(tmp_path):
    write(tmp_path / "a.safetensors", {"x": torch.zeros(64)}, {})
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-8])
    for name in ("b.safetensors", "absent.safetensors"):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
