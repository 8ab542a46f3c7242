"""Images that lie elsewhere: the same batches, the same results, the same resume, and nothing is copied."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import fsspec
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


FILES = {f"{n}.png": picture(n) for n in range(7)} | {f"{n}.txt": f"picture {n}".encode() for n in range(7)}


@pytest.fixture
def server(tmp_path: Path):
    """Two shards of a tar, and the same files in a folder, by HTTP and as S3 gives them."""
    shards = {f"shards/{n}.tar": {k: v for k, v in FILES.items() if (int(k[0]) > 3) == bool(n)} for n in range(2)}
    packed = {name: tar(tmp_path / "packed.tar", files).read_bytes() for name, files in shards.items()}
    with serving(packed | {f"photos/{name}": content for name, content in FILES.items()}) as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for name, content in FILES.items():
        (tmp_path / "photos" / name).write_bytes(content)
    return tmp_path / "photos"


@pytest.fixture
def run(settings, tmp_path, sd15_folder):
    """(name, path, overrides) -> the weights after six steps, and the run's folder; nothing of the images is cached."""

    def _run(name, path, *overrides):
        target = tmp_path / name
        target.mkdir(exist_ok=True)
        common = (f"model.checkpoint={sd15_folder}", f"data.path={path}", f"data.cache_dir={tmp_path / 'cache'}")
        small = ("data.resolution=64", "data.batch_size=2", "data.cache=false", "logger=none", "trainer.max_steps=6")
        saved = ("callbacks.checkpoint.every=3", "++callbacks.checkpoint.keep=10", "callbacks.sampling=null")
        train(settings(*common, *small, *saved, "data.workers=0", *overrides), target)
        checkpoint = torch.load(target / "checkpoints" / "step-00000006.ckpt", weights_only=False)
        return checkpoint["state_dict"], target

    return _run


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_from_shards_elsewhere_is_that_of_the_folder_bit_for_bit_also_resumed(run, server, folder, tmp_path):
    """Six steps from a disk; three from a server, and, in workers, three more after the run was cut off."""
    expected, _ = run("here", folder)
    whole, target = run("there", f"{server.url}/shards/")
    assert equal(whole, expected)
    (target / "checkpoints" / "step-00000006.ckpt").unlink()
    server.requests.clear()
    again, _ = run("there", f"{server.url}/shards/", "data.workers=1", "resume=auto", "output.overwrite=true")
    assert equal(again, expected)
    read = [path for method, path, asked in server.requests if asked]
    assert set(read) == {"shards/0.tar", "shards/1.tar"} and server.bytes_sent < 20 * len(FILES["0.png"])
    kept = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert {path.suffix for path in kept} == {".jsonl"} and FILES["0.png"] not in b"".join(map(Path.read_bytes, kept))


@pytest.fixture
def s3(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # of the server of another test
    return server


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
