import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageOps

from otl.config import SettingsError
from otl.datamodules.images import ORIENTATION_TAG, load, pixels
from otl.datamodules.views import View, centred
from otl.types import Crop, Size

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(top: tuple[int, ...] = RED, bottom: tuple[int, ...] = BLUE) -> Image.Image:
    """32 high, 16 wide."""
    image = Image.new("RGB", (16, 32), bottom)
    image.paste(top, (0, 0, 16, 16))
    return image


def near(colour: tuple[int, ...], expected: tuple[int, ...], by: int = 3) -> bool:
    return all(abs(a - b) <= by for a, b in zip(colour, expected, strict=True))


TURNS = {  # EXIF orientation -> what a camera that writes it did to the picture
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", TURNS)
def test_images_are_turned_upright(tmp_path, orientation, suffix):
    image = halves()
    image.paste(WHITE, (0, 0, 8, 8))
    turn = TURNS[orientation]
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    path = tmp_path / f"a.{suffix}"
    (image.transpose(turn) if turn is not None else image).save(path, exif=exif)
    upright = load(path, "white")
    assert upright.size == (16, 32)
    corners = [upright.getpixel(at) for at in ((3, 3), (12, 3), (3, 28))]
    assert all(near(corner, colour, 40) for corner, colour in zip(corners, (WHITE, RED, BLUE)))


def test_transparent_pixels_take_the_background(tmp_path):
    image = halves().convert("RGBA")
    image.paste((9, 9, 9, 0), (0, 0, 16, 16))
    image.save(tmp_path / "a.png")
    assert load(tmp_path / "a.png", "#00ff00").getpixel((5, 5)) == (0, 255, 0)
    assert load(tmp_path / "a.png", "#00ff00").getpixel((5, 25)) == BLUE


def test_half_transparent_pixels_are_mixed(tmp_path):
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "a.png")
    assert near(load(tmp_path / "a.png", "white").getpixel((0, 0)), (127, 127, 127), 1)


def test_a_transparent_palette_entry_takes_the_background(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "a.png", transparency=0)
    loaded = load(tmp_path / "a.png", "white")
    assert (loaded.getpixel((0, 0)), loaded.getpixel((1, 1))) == (WHITE, RED)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "a.tif"
    Image.new("RGB", (8, 8), WHITE).convert(mode).save(path)
    loaded = load(path, "black")
    assert loaded.mode == "RGB" and near(loaded.getpixel((4, 4)), WHITE)


def test_cmyk_photographs_keep_their_colours(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert near(load(tmp_path / "a.jpg", "white").getpixel((8, 8)), RED, 6)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_greys_are_scaled_not_clipped(tmp_path, suffix):
    levels = np.array([[0, 32768], [65535, 257 * 7]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    loaded = np.asarray(load(tmp_path / f"a.{suffix}", "white"))
    assert loaded[..., 0].tolist() == [[0, 128], [255, 7]]


def test_a_transparent_level_of_sixteen_bits_takes_the_background(tmp_path):
    """One level below the transparent one is the same in eight bits, and is seen."""
    levels = np.array([[30000, 29999]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=30000)
    assert np.asarray(load(tmp_path / "a.png", "red")).tolist() == [[[255, 0, 0], [117, 117, 117]]]


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_greys_that_count_from_white_are_turned_round(tmp_path, dtype, white):
    tifffile.imwrite(tmp_path / "a.tif", np.array([[0, white]], dtype=dtype), photometric="miniswhite")
    assert np.asarray(load(tmp_path / "a.tif", "white"))[..., 0].tolist() == [[255, 0]]


def test_floating_point_levels_without_a_value_are_black(tmp_path):
    Image.fromarray(np.array([[np.nan, 1.0]], dtype=np.float32)).save(tmp_path / "a.tif")
    assert np.asarray(load(tmp_path / "a.tif", "white"))[..., 0].tolist() == [[0, 255]]


@pytest.mark.parametrize(("dtype", "middle"), [(np.uint8, 128), (np.uint16, 128 * 257)])
def test_the_profile_of_greys_is_applied(tmp_path, dtype, middle):
    """In linear light the middle level is sRGB's 188 (IEC 61966-2-1)."""
    Image.fromarray(np.full((4, 4), middle, dtype=dtype)).save(tmp_path / "a.png", icc_profile=linear_grey())
    assert near(load(tmp_path / "a.png", "white").getpixel((0, 0)), (188, 188, 188), 2)


def linear_grey() -> bytes:
    """A display's grey profile of gamma 1 (ICC.1:2001-04)."""
    text = b"linear grey\0"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061),
        b"kTRC": b"curv" + bytes(8),
    }
    table, content, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    size = start + len(content)
    header = struct.pack(">I4xI4s4s4s12x4s", size, 0x02400000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">iii", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + content


def test_sixteen_bit_colours_are_scaled(tmp_path):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header, row = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), b"\0" + struct.pack(">HHH", 65535, 0, 128 * 257)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert load(tmp_path / "a.png", "white").getpixel((0, 0)) == (255, 0, 128)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert near(load(tmp_path / f"a.{suffix}", "white").getpixel((4, 4)), RED)


def test_an_embedded_profile_is_applied(tmp_path):
    """In a profile of linear light, the middle level is sRGB's 188 (IEC 61966-2-1)."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4), (128, 128, 128)).save(path, icc_profile=linear_profile())
    assert near(load(path, "white").getpixel((0, 0)), (188, 188, 188), 2)


def test_transparency_survives_a_profile(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (4, 4), (128, 128, 128, 0)).save(path, icc_profile=linear_profile())
    assert load(path, "red").getpixel((0, 0)) == RED


def test_a_damaged_profile_is_ignored(tmp_path):
    Image.new("RGB", (4, 4), RED).save(tmp_path / "a.png", icc_profile=b"no profile")
    assert load(tmp_path / "a.png", "white").getpixel((0, 0)) == RED


def linear_profile() -> bytes:
    """sRGB's profile with its three tone curves replaced by gamma 1."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile = bytearray(bytes(profile).replace("sRGB".encode("utf-16-be"), "line".encode("utf-16-be")))
    count = struct.unpack_from(">I", profile, 128)[0]
    for entry in range(132, 132 + 12 * count, 12):
        name, offset, _ = struct.unpack_from(">4sII", profile, entry)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            profile[offset : offset + 12] = b"curv" + bytes(8)  # a curve of no points is the identity
            struct.pack_into(">I", profile, entry + 8, 12)
    return bytes(profile)


def test_pixels_are_the_middle_of_the_image_at_the_bucket_size(tmp_path):
    image = Image.new("RGB", (32, 64), BLUE)
    image.paste(RED, (0, 16, 32, 48))
    image.save(tmp_path / "a.png")
    cut = pixels(tmp_path / "a.png", centred(Size(64, 32), Size(16, 16)), "white")
    assert cut.shape == (3, 16, 16) and cut.dtype == torch.float32
    assert near(tuple(((cut[:, 8, 8] + 1) * 127.5).tolist()), RED, 1)
    assert cut.min() >= -1 and cut.max() <= 1


def test_an_image_of_the_buckets_size_is_not_resampled(tmp_path):
    levels = torch.randint(0, 256, (16, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(levels.numpy()).save(tmp_path / "a.png")
    cut = pixels(tmp_path / "a.png", centred(Size(16, 24), Size(16, 24)), "white")
    assert torch.equal(cut, levels.permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_photographs_are_drafted_without_a_visible_change(tmp_path, orientation):
    """The same picture as PNG is decoded in full. Its waves are five pixels long in the bucket."""
    waves = 127.5 + 100 * np.sin(np.arange(512) * 2 * np.pi / 40)[None, :, None] * np.ones((384, 1, 3))
    image = Image.fromarray(waves.astype(np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    image.save(tmp_path / "a.jpg", exif=exif, quality=98, subsampling=0)
    image.save(tmp_path / "a.png", exif=exif)
    lying = centred(Size(512, 384), Size(64, 48))
    view = lying if orientation == 6 else centred(Size(384, 512), Size(48, 64))
    drafted, full = (pixels(tmp_path / f"a.{suffix}", view, "white") for suffix in ("jpg", "png"))
    assert (drafted - full).abs().max() < 4 / 127.5


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("options", [{}, {"progressive": True, "subsampling": 0}, {"mode": "L"}, {"format": "MPO"}])
@pytest.mark.parametrize("reduced", [False, True])
def test_jpegs_have_the_very_levels_of_pillow(tmp_path, orientation, options, reduced):
    """Also where both decode at half the size first."""
    draw = torch.rand(1, 3, 9, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(draw, (90, 64), mode="bicubic").clamp(0, 1)[0]
    image = Image.fromarray((smooth.permute(1, 2, 0) * 255).byte().numpy()).convert(options.get("mode", "RGB"))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    path = tmp_path / "a.jpg"
    image.save(path, exif=exif, **({"format": "JPEG"} | options))
    with Image.open(path) as lying:
        if reduced:
            lying.draft(None, (32, 45))
            assert lying.size == (32, 45)
        upright = ImageOps.exif_transpose(lying).convert("RGB")
    expected = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    size = Size(*expected.shape[1:])
    if reduced:
        size = Size(size.h * 2 // 3, size.w * 2 // 3)
        expected = torch.nn.functional.interpolate(expected[None], tuple(size), mode="bicubic", antialias=True)[0]
    assert torch.equal(pixels(path, View(size, size, Crop(0, 0)), "white"), expected / 127.5 - 1)


def test_a_jpeg_s_profile_is_applied(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (16, 16), (128, 128, 128)).save(path, icc_profile=linear_profile(), quality=100)
    shown = pixels(path, centred(Size(16, 16), Size(16, 16)), "white")
    assert near(tuple(((shown[:, 8, 8] + 1) * 127.5).tolist()), (188, 188, 188), 2)


def test_a_jpeg_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(SettingsError, match=r"a\.jpg: cannot be decoded \(damaged or cut off: image file is truncated"):
        pixels(path, centred(Size(64, 64), Size(64, 64)), "white")


def test_a_file_that_cannot_be_decoded_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(SettingsError, match=r"broken\.png: cannot be decoded .*data\.verify_images=true"):
        load(path, "white")


def test_a_colour_that_is_none_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"data\.background=whit"):
        load(Path("a.png"), "whit")
