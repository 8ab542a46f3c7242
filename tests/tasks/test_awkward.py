"""A folder of awkward files goes through plan, cache and training, and of each it is said what becomes of it."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from rich.console import Console
from safetensors.torch import load_file

from otl.config import SettingsError
from otl.datamodules.cache import Cache
from otl.datamodules.upkeep import contents as contents_of
from otl.tasks import tables
from otl.tasks.cache import cache
from otl.tasks.train import train
from tests.datamodules.test_images import ORIENTATION_TAG, linear_profile

NOT_TEXT = os.fsdecode(b"not-utf8-\xe9.png")
WHOLE = [
    "cmyk.jpg",
    "cmyk-profile.tif",
    "lab.tif",
    "grey16.png",
    "grey16-transparent.png",
    "float.tif",
    "one-bit.png",
    "palette-transparent.png",
    "palette-alpha.png",
    "half-transparent.webp",
    "profile.png",
    "damaged-profile.jpg",
    "animated.gif",
    "animated.webp",
    "two-pictures.mpo.jpg",
    "is-a-png.jpg",
    "is-a-jpeg.webp",
    "trailing-bytes.jpg",
    "two-by-two.png",
    "wide.png",
    "BIG.JPEG",
    "Ünïcödé 猫 e\u0301.png",
    "line\nbreak: colon.png",
    NOT_TEXT,
    "n" * 251 + ".png",
    *(f"turned-{number}.jpg" for number in range(1, 9)),
    "sub/linked.png",
]
BROKEN = {  # what is said of it
    "cut-off.jpg": "truncated",
    "cut-off.png": "truncated",
    "cut-off.gif": "truncated",
    "cut-off.webp": "damaged or cut off: ",
    "empty.png": "it is empty",
    "text.jpg": "no image of a kind that is read",
    "link-to-itself.png": f"it is a link that leads nowhere ({os.strerror(40)})",
    "link-to-nothing.png": "it is a link that leads nowhere (No such file",
    "pipe.png": "it is no regular file",
    "one-pixel.png": "it is 1x1 pixels",
    "thin.png": "it is 1x300 pixels",
    "600-megapixels.png": "20000x30000 (height x width) are 600 megapixels, more than data.max_megapixels=200",
    "caption-in-latin-1.png": "is not UTF-8 text",
    "phone.heic": "of a kind that is not read",
}


def picture(h: int = 64, w: int = 64, seed: int = 0) -> Image.Image:
    """No two seeds alike."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def turned(number: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = number
    return saved(picture(64, 96, seed=number), "JPEG", exif=exif)


def contents() -> dict[str, bytes]:
    """Name -> the file."""
    plain = picture()
    grey16 = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (64, 64), dtype=np.uint16))
    lab = ImageCms.profileToProfile(
        plain, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    palette = picture(seed=2).quantize(16)
    transparent = picture(seed=3).convert("RGBA")
    transparent.putalpha(128)
    frames = [picture(seed=4), picture(seed=5)]
    return {
        "cmyk.jpg": saved(plain.convert("CMYK"), "JPEG"),
        "cmyk-profile.tif": saved(plain.convert("CMYK"), "TIFF", icc_profile=linear_profile()),
        "lab.tif": saved(lab, "TIFF"),
        "grey16.png": saved(grey16, "PNG"),
        "grey16-transparent.png": saved(grey16, "PNG", transparency=7),
        "float.tif": saved(plain.convert("F"), "TIFF"),
        "one-bit.png": saved(plain.convert("1"), "PNG"),
        "palette-transparent.png": saved(palette, "PNG", transparency=3),
        "palette-alpha.png": saved(palette, "PNG", transparency=bytes(range(0, 256, 16))),
        "half-transparent.webp": saved(transparent, "WEBP"),
        "profile.png": saved(plain, "PNG", icc_profile=linear_profile()),
        "damaged-profile.jpg": saved(plain, "JPEG", icc_profile=b"no profile"),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "animated.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "two-pictures.mpo.jpg": saved(frames[0], "MPO", save_all=True, append_images=frames[1:]),
        "is-a-png.jpg": saved(picture(seed=6), "PNG"),
        "is-a-jpeg.webp": saved(picture(seed=6), "JPEG"),
        "trailing-bytes.jpg": saved(picture(seed=7), "JPEG") + bytes(9000),
        "two-by-two.png": saved(picture(2, 2), "PNG"),
        "wide.png": saved(picture(10, 900), "PNG"),
        "BIG.JPEG": saved(picture(800, 1200), "JPEG"),
        "Ünïcödé 猫 e\u0301.png": saved(picture(seed=8), "PNG"),
        "line\nbreak: colon.png": saved(picture(seed=9), "PNG"),
        NOT_TEXT: saved(picture(seed=10), "PNG"),
        "n" * 251 + ".png": saved(picture(seed=11), "PNG"),
        "sub/linked.png": saved(picture(seed=12), "PNG"),
        "cut-off.jpg": saved(picture(seed=13), "JPEG")[:2000],
        "cut-off.png": saved(picture(seed=13), "PNG")[:2000],
        "cut-off.gif": saved(picture(seed=13), "GIF")[:2000],
        "cut-off.webp": saved(picture(seed=13), "WEBP")[:2000],
        "empty.png": b"",
        "text.jpg": b"I am no picture",
        "one-pixel.png": saved(picture(1, 1), "PNG"),
        "thin.png": saved(picture(1, 300), "PNG"),
        "600-megapixels.png": saved(Image.new("1", (30000, 20000)), "PNG", compress_level=1),
        "caption-in-latin-1.png": saved(picture(seed=14), "PNG"),
        "phone.heic": b"ftypheic",
        **{f"turned-{number}.jpg": turned(number) for number in range(1, 9)},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file above, with captions, links in circles and a pipe."""
    root = tmp_path_factory.mktemp("awkward") / "photos"
    for name, content in contents().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_bytes(b"\xef\xbb\xbfa caption\r\n\r\nanother one\r\n")
    (root / "caption-in-latin-1.txt").write_bytes("Kätzchen".encode("latin-1"))
    (root / "link-to-itself.png").symlink_to(root / "link-to-itself.png")
    (root / "link-to-nothing.png").symlink_to(root / "nothing.png")
    (root / "sub" / "up").symlink_to(root)
    os.mkfifo(root / "pipe.png")
    return root


@pytest.fixture
def overrides(folder: Path, sd15_folder: Path, tmp_path: Path) -> list[str]:
    return [
        *(f"model.checkpoint={sd15_folder}", f"data.path={folder}", f"data.cache_dir={tmp_path / 'cache'}"),
        *("data.resolution=64", "data.batch_size=4", "data.workers=0", "logger=none"),
        *("callbacks.sampling=null", "trainer.max_epochs=1"),
    ]


def test_every_broken_file_is_named_before_the_run(settings, overrides, folder, tmp_path):
    with pytest.raises(SettingsError) as refused:
        train(settings(*overrides), tmp_path)
    said = str(refused.value)
    assert f"data.broken_images: {len(BROKEN) - 1} files" in said  # all but the one of a kind that is not read
    assert "data.broken_images=skip" in said and f"{folder}/600-megapixels.png: 20000x30000" in said


def test_the_rest_is_trained_on_and_of_each_it_is_said_what_became_of_it(settings, overrides, folder, tmp_path):
    train(settings(*overrides, "data.broken_images=skip"), tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    rows = {Path(row["path"]).relative_to(folder).as_posix(): row for row in plan["images"]}
    assert sorted(rows) == sorted([*WHOLE, *BROKEN]) and len(plan["images"]) == len(rows)
    assert sorted(name for name, row in rows.items() if row["dropped"]) == sorted(BROKEN)
    for name, reason in BROKEN.items():
        assert reason in rows[name]["reason"], name
    for number in range(1, 9):  # 64 high and 96 wide, and lying on its side from 5 on
        assert rows[f"turned-{number}.jpg"]["size"] == ([96, 64] if number >= 5 else [64, 96])
    lies = [warning for warning in plan["warnings"] if "the extension of another format" in warning["message"]]
    assert [Path(file).name for file in lies[0]["files"]] == ["is-a-jpeg.webp: it is JPEG", "is-a-png.jpg: it is PNG"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert sorted(manifest["images"]) == sorted(str(folder / name) for name in WHOLE)
    weights = load_file(tmp_path / "final.safetensors")
    assert weights and all(tensor.isfinite().all() for tensor in weights.values())


def test_the_cache_is_filled_with_the_rest_and_names_what_is_left_out(settings, overrides, folder, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        cache(settings(*overrides, "data.broken_images=skip", "trainer.accelerator=cpu"), folder=tmp_path)
    assert f"{folder}/cut-off.jpg: damaged or cut off" in caplog.text
    assert "3 more: task=plan lists all in plan.json" in caplog.text
    counts = {each.origin.kind: each.entries for each in contents_of(Cache(tmp_path / "cache"))}
    assert counts["image"] == len(WHOLE)


def test_the_plan_is_shown_whatever_the_names_are(settings, overrides, folder, tmp_path):
    from otl.tasks.plan import make

    made, _ = make(settings(*overrides, "data.broken_images=skip", "data.missing_captions=warn"))
    made["warnings"].append({"about": "test", "message": "all files", "files": [str(folder / NOT_TEXT)]})
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as a terminal's is
    tables.show(made, Console(file=file))
    file.flush()
    assert "not-utf8-" in file.buffer.getvalue().decode()
