"""Images that lie elsewhere: the same batches, the same results, the same resume, and nothing is copied."""

from __future__ import annotations

import csv
import io
import tempfile
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from otl.config import Data
from otl.tasks.train import train
from tests.datamodules.fakes import CountingEncoder, module
from tests.datamodules.sources.conftest import tar
from tests.servers import Server, serving


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64) if number < 4 else (96, 64), (30 * number, 100, 200)).save(file, "PNG")
    return file.getvalue()


IMAGES = {f"{n}.png": picture(n) for n in range(7)}
FILES = IMAGES | {f"{n}.txt": f"picture {n}".encode() for n in range(7)}


def parquet(names: list[str]) -> bytes:
    """A table as Hugging Face's hub has them, in row groups of two."""
    rows = [{"image": {"bytes": IMAGES[name], "path": name}, "text": f"picture {name[0]}"} for name in names]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    return file.getvalue()


@pytest.fixture
def server(tmp_path: Path):
    """Two shards of a tar, two tables, and the same files in a folder, by HTTP and as S3 gives them."""
    shards = {f"shards/{n}.tar": {k: v for k, v in FILES.items() if (int(k[0]) > 3) == bool(n)} for n in range(2)}
    packed = {name: tar(tmp_path / "packed.tar", files).read_bytes() for name, files in shards.items()}
    tables = {"tables/0.parquet": parquet(list(IMAGES)[:4]), "tables/1.parquet": parquet(list(IMAGES)[4:])}
    (tmp_path / "packed.tar").unlink()
    with serving(packed | tables | {f"photos/{name}": content for name, content in FILES.items()}) as server:
        yield server


@pytest.fixture(scope="module")
def run(settings, sd15_folder):
    """(run's folder, path, overrides) -> the weights after six steps, and the losses; nothing is cached."""

    def _run(target, path, *overrides):
        target.mkdir(exist_ok=True)
        common = (f"model.checkpoint={sd15_folder}", f"data.path={path}", f"data.cache_dir={target.parent / 'cache'}")
        small = ("data.resolution=64", "data.batch_size=2", "data.cache=false", "logger=none", "trainer.max_steps=6")
        saved = ("callbacks.checkpoint.every=3", "++callbacks.checkpoint.keep=10", "callbacks.sampling=null")
        train(settings(*common, *small, *saved, "data.workers=0", *overrides), target)
        checkpoint = torch.load(last(target), weights_only=False)
        return checkpoint["state_dict"], losses(target)

    return _run


def last(target: Path) -> Path:
    return target / "checkpoints" / "step-00000006.ckpt"


def losses(target: Path) -> list[tuple[str, str]]:
    """Step and loss as they are written down."""
    with (target / "metrics.csv").open() as file:
        return [(row["step"], row["loss"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def expected(run, tmp_path_factory):
    """What a run gives whose images lie in a folder on the disk."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "photos").mkdir()
    for name, content in FILES.items():
        (folder / "photos" / name).write_bytes(content)
    return run(folder / "run", folder / "photos")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of the server of another test
    return server


@pytest.mark.parametrize(("place", "bytes"), [("s3://photos", 0), ("s3://shards", 4_000), ("{url}/tables/", 40_000)])
def test_a_run_from_elsewhere_is_that_of_the_folder_bit_for_bit_also_resumed(
    run, expected, s3, tmp_path, monkeypatch, tmp_path_factory, place, bytes
):
    """Six steps; and three more, in workers, after the run was cut off. Nothing of the images comes to the disk.

    Args:
        bytes: at most, that these three fetch by ranges: of an archive the images alone, of a table whole row groups.
    """
    temporary = tmp_path_factory.mktemp("tmp")  # a short path: the workers' sockets lie there
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    path, target = place.format(url=s3.url), tmp_path / "run"
    weights, written = run(target, path)
    assert equal(weights, expected[0]) and written == expected[1] and len(written) == 6
    last(target).unlink()
    s3.requests.clear()
    weights, written = run(target, path, "data.workers=1", "resume=auto", "output.overwrite=true")
    assert equal(weights, expected[0]) and written == expected[1]
    assert s3.requests and s3.bytes_sent <= bytes
    kept = [path.read_bytes() for folder in (tmp_path, temporary) for path in folder.rglob("*") if path.is_file()]
    assert kept and not any(image in content for content in kept for image in IMAGES.values())


@pytest.mark.parametrize("place", ["photos", "shards"])
def test_the_cache_is_filled_by_reading_each_image_once(s3, tmp_path, place):
    settings = Data(path=f"s3://{place}", cache_dir=str(tmp_path / "cache"), workers=0)
    encoder = CountingEncoder()
    made = module(settings)
    s3.requests.clear()
    made.fill_cache(encoder, images=True, prompts=True)
    assert encoder.images == len(encoder.prompts) == 7
    read = Counter((path, asked) for method, path, asked in s3.requests if method == "GET")
    assert len(read) == 7 and set(read.values()) == {1}
    s3.requests.clear()
    again = module(settings)
    again.fill_cache(encoder, images=True, prompts=True)
    assert encoder.images == 7 and [batch.latents is not None for batch in again.train_dataloader()] == [True] * 7
    assert [path for method, path, asked in s3.requests if asked or path.endswith(".png")] == []
