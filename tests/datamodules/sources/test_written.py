"""What the libraries write that people keep datasets with, and Hugging Face's hub through its own client."""

from pathlib import Path

import fsspec
import pytest

from otl.datamodules import images
from tests.servers import serving

WRITTEN = Path(__file__).parent / "written"  # see write.py there
EXPECTED = [("a red field", 10, (48, 64)), ("a field, redder", 20, (48, 64)), ("a small field", 30, (48, 48))]
TABLE = "train-00000-of-00001.parquet"


def seen(samples):
    """Caption, red, size."""
    return [
        (*sample.captions, images.load(sample.path, "white").getpixel((0, 0))[0], sample.size) for sample in samples
    ]


@pytest.mark.parametrize("place", ["saved", "splits/train", "hub", f"hub/{TABLE}", "webdataset"])
def test_datasets_are_read_as_their_own_libraries_write_them(searched, place):
    samples, problems = searched(WRITTEN / place)
    assert seen(samples) == EXPECTED and problems == []


def test_of_a_saved_dataset_with_splits_one_is_to_be_given(searched):
    (problem,) = searched(WRITTEN / "splits")[1]
    assert problem.fatal and problem.message.endswith(
        f"several splits (test, train): give one, such as {WRITTEN}/splits/train"
    )


@pytest.fixture
def hub(monkeypatch):
    """A dataset of the hub, on this machine; the client is the real one."""
    inside = "datasets/user/name/resolve/main"
    table = (WRITTEN / "hub" / TABLE).read_bytes()
    with serving({f"{inside}/data/{TABLE}": table, f"{inside}/README.md": b"a dataset"}) as server:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": server.url})
        yield server


@pytest.mark.parametrize("inside", ["", "/data", f"/data/{TABLE}", "/data/train-*.parquet"])
def test_a_dataset_of_the_hub_is_read_through_its_own_client(searched, hub, inside):
    samples, problems = searched(f"hf://datasets/user/name{inside}")
    assert seen(samples) == EXPECTED and problems == []
    assert {path for _, path, asked in hub.requests if asked} == {f"datasets/user/name/resolve/main/data/{TABLE}"}


@pytest.mark.parametrize("path", ["hf://datasets/user/name/nowhere/*.parquet", "hf://datasets/user/name/nowhere"])
def test_a_folder_of_the_hub_that_is_not_there_is_named(searched, hub, path):
    (problem,) = searched(path)[1]
    assert problem.fatal and f"{path}: there are no files" in problem.message
