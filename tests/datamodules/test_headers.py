import io
import os

import numpy as np
import pytest
from PIL import Image

from otl.config import SettingsError
from otl.datamodules import headers
from otl.datamodules.headers import Limits, examined, read
from otl.types import Size

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def header(content: bytes, **limits: object) -> headers.Header:
    return examined(io.BytesIO(content), Limits(**limits))


FORMATS = ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "TGA", "PPM", "QOI", "PCX", "SGI", "DDS"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_is_cut_off_is_told_from_a_whole_one(format):
    content = saved(NOISE, format)
    whole = header(content)
    assert (whole.flaw, whole.size, whole.bytes) == ("", Size(96, 64), len(content))
    for share in (0.1, 0.5, 0.9, 0.99):
        assert header(content[: int(len(content) * share)]).flaw


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF"])
def test_usual_formats_are_not_decoded(format, monkeypatch):
    content = saved(NOISE, format)
    Image.init()
    for kind in {type(Image.open(io.BytesIO(content))), Image.Image}:
        monkeypatch.setattr(kind, "load", lambda self: pytest.fail("decoded"))
    assert header(content).flaw == ""


def test_bytes_after_the_end_do_no_harm():
    for format in ("JPEG", "PNG", "GIF"):
        assert header(saved(NOISE, format) + bytes(10000)).flaw == ""


@pytest.mark.parametrize(("size", "flawed"), [((1, 1), True), ((500, 1), True), ((1, 2), True), ((2, 2), False)])
def test_a_side_of_one_pixel_is_a_flaw(size, flawed):
    assert bool(header(saved(Image.new("RGB", size), "PNG")).flaw) is flawed


def test_the_limit_is_in_megapixels():
    content = saved(Image.new("1", (2000, 1000)), "PNG")
    assert header(content, max_megapixels=2).flaw == ""
    flaw = header(content, max_megapixels=1.9).flaw
    assert flaw == "1000x2000 (height x width) are 2 megapixels, more than data.max_megapixels=1.9"


def test_pillows_own_limit_is_out_of_the_way():
    """178,956,970 pixels, from where on Pillow refuses."""
    assert header(saved(Image.new("1", (20000, 10000)), "PNG"), max_megapixels=300).flaw == ""


def test_pixels_are_looked_at_where_that_is_asked_for():
    content = bytearray(saved(NOISE, "PNG"))
    content[content.index(b"IDAT") + 6] ^= 255
    assert header(bytes(content)).flaw == ""
    assert header(bytes(content), decodes=True).flaw


def test_an_empty_file_is_called_empty():
    assert header(b"").flaw == "it is empty"


@pytest.mark.parametrize("name", ["loop", "gone"])
def test_a_link_that_leads_nowhere_says_so(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    flaw = read(tmp_path / name, Limits()).flaw
    assert flaw == f"it is a link that leads nowhere ({os.strerror(40 if name == 'loop' else 2)})"


def test_what_cannot_be_fetched_is_no_flaw_of_the_file():
    """Left out for a flaw, it would be missing in a run whose network fails for a moment."""

    class Failing(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            raise SettingsError("cannot be read")

    with pytest.raises(SettingsError):
        examined(Failing(b"x" * 10), Limits())


def test_a_header_survives_json():
    found = header(saved(NOISE, "PNG"))
    assert headers.from_json(headers.as_json(found)) == found
