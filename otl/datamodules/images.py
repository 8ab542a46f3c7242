"""From a file to the pixels of a bucket: upright, RGB, scaled, cropped."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from otl.config import SettingsError
from otl.datamodules import colours
from otl.datamodules.views import View, overhang
from otl.types import File, Size

Levels = np.ndarray[Any, np.dtype[np.uint8]]

VERSION = 2  # part of the cache's keys: raise it when the same file gives other pixels
DRAFT_MARGIN = 1.5  # a JPEG is decoded at a reduced size that is still this many times the scaled size
ORIENTATION_TAG = 0x0112
PHOTOMETRIC = 262  # TIFF's tag of what the levels mean; 0: white is zero
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what sets it right
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
UNREADABLE = (  # what Pillow raises of damaged files
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, RuntimeError, TypeError),
    *(AssertionError, LookupError, ArithmeticError, MemoryError),
)


def opened(file: IO[bytes]) -> Image.Image:
    """An image whose header is read."""
    Image.MAX_IMAGE_PIXELS = None  # data.max_megapixels decides; Pillow knows but one limit for all that is opened
    return Image.open(file)


def reason(error: Exception) -> str:
    """What is wrong with a file, in words; Pillow's own name buffers."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a kind that is read"
    if isinstance(error, MemoryError):
        return "it does not fit into the memory"
    if isinstance(error, OSError) and error.strerror:  # the disk's, not Pillow's
        return error.strerror
    return f"damaged or cut off: {error or type(error).__name__}"


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8, from the header alone."""
    if image.format == "TIFF":
        return 1  # Pillow turns these by itself
    # PNG's own getexif decodes the whole image.
    return Image.Image.getexif(image).get(ORIENTATION_TAG, 1)


def upright_size(image: Image.Image) -> Size:
    """The size that an opened image has once it is turned upright."""
    sides = (image.width, image.height) if orientation(image) >= 5 else (image.height, image.width)
    return Size(*sides)


def header_size(path: File) -> Size:
    """The upright size of a file, from its header alone.

    Raises:
        One of UNREADABLE.
    """
    with path.open("rb") as file, opened(file) as image:
        return upright_size(image)


def load(path: File, background: str) -> Image.Image:
    """The image as RGB, upright, in sRGB, of an animation the first frame.

    Args:
        path: of the file.
        background: colour under transparent pixels, a name or #rrggbb.

    Raises:
        SettingsError: the file cannot be read, or `background` is no colour.
    """
    colour = _colour(background)
    return _decoded(path, lambda image: _flat(_srgb(_eight_bit(image)), colour))


def grey(path: File) -> Image.Image:
    """A mask as 8 bit grey, upright; what is transparent in it is black.

    Raises:
        SettingsError: the file cannot be read.
    """
    return _decoded(path, _grey)


def alpha(path: File) -> Image.Image:
    """The alpha channel of an image as 8 bit grey, upright; white where it has none.

    Raises:
        SettingsError: the file cannot be read.
    """
    return _decoded(path, _alpha)


def has_alpha(path: File) -> bool:
    """Whether some of an image may be transparent, from its header alone.

    Raises:
        One of UNREADABLE.
    """
    with path.open("rb") as file, opened(file) as image:
        return bool(image.has_transparency_data)


def pixels(path: File, view: View, background: str) -> Tensor:
    """float32 [3, H, W] in -1..1: what the view shows of an image.

    Raises:
        SettingsError: as `load`.
    """
    colour = _colour(background)
    with _named(path), opened(io.BytesIO(content := path.read_bytes())) as image:
        turn = orientation(image)
        scaled = view.scaled if turn < 5 else Size(view.scaled.w, view.scaled.h)
        levels = torch.from_numpy(_levels(image, content, scaled, colour)).permute(2, 0, 1)
    shown = colours.adjusted(cut(_upright(levels, turn)[None], view, mode="bicubic").float(), view.colours)
    return shown.div_(127.5).sub_(1).contiguous()


def cut(levels: Tensor, view: View, *, mode: str) -> Tensor:
    """[1, C, any height, any width] of a whole image or mask, upright, in 0..255 -> [C, H, W] of what the view shows.

    Args:
        mode: of the scaling, "bicubic" or "bilinear".
    """
    if levels.shape[2:] != view.scaled:
        levels = functional.interpolate(levels, size=tuple(view.scaled), mode=mode, antialias=True)
    beyond = overhang(view.bucket, view.angle)
    h, w = view.bucket.h + 2 * beyond.h, view.bucket.w + 2 * beyond.w
    top, left = view.crop.top - beyond.h, view.crop.left - beyond.w
    if view.mirrored:
        left = view.scaled.w - w - left
    window = levels[:, :, top : top + h, left : left + w]
    window = window.flip(-1) if view.mirrored else window
    return (_turned(window, view, mode) if view.angle else window)[0]


def _turned(window: Tensor, view: View, mode: str) -> Tensor:
    """[1, C, h, w], which reaches as far as the turned bucket does -> [1, C, H, W]; both have the same middle."""
    (h, w), (inside_h, inside_w) = view.bucket, window.shape[2:]
    cos, sin = math.cos(math.radians(view.angle)), math.sin(math.radians(view.angle))
    to_window = [[cos * w / inside_w, -sin * h / inside_w, 0], [sin * w / inside_h, cos * h / inside_h, 0]]
    grid = functional.affine_grid(torch.tensor([to_window]), [1, window.shape[1], h, w], align_corners=False)
    turned = functional.grid_sample(window.float(), grid, mode=mode, padding_mode="border", align_corners=False)
    return turned.clamp_(0, 255)


def _decoded(path: File, finish: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What `finish` makes of an image, upright."""
    with _named(path), opened(io.BytesIO(path.read_bytes())) as image:
        turn = UPRIGHT.get(orientation(image))
        image.load()
        finished = finish(image)
    return finished.transpose(turn) if turn is not None else finished


@contextmanager
def _named(path: File) -> Iterator[None]:
    """Errors of a file that cannot be decoded become ones that name it."""
    try:
        yield
    except SettingsError:
        raise
    except UNREADABLE as error:
        raise SettingsError(
            f"{path}: cannot be decoded ({reason(error)}); replace the file or move it out of the folder; "
            "data.verify_images=true finds all such before a run, data.broken_images=skip leaves them out"
        ) from error


def _levels(image: Image.Image, content: bytes, scaled: Size, colour: tuple[int, ...]) -> Levels:
    """[h, w, 3] of an opened image, as it lies in the file, perhaps at a reduced size that still serves to scale it.

    Args:
        content: of its file.
        scaled: the size that it is to be scaled to.
        colour: under transparent pixels.
    """
    h, w = round(scaled.h * DRAFT_MARGIN), round(scaled.w * DRAFT_MARGIN)
    plain = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L") and _foreign(image) is None
    if plain and (levels := _jpeg(content, Size(image.height, image.width), Size(h, w))) is not None:
        return levels
    image.draft(None, (w, h))
    image.load()
    return np.array(_flat(_srgb(_eight_bit(image)), colour))


def _jpeg(content: bytes, size: Size, least: Size) -> Levels | None:
    """[h, w, 3] of a JPEG: Pillow's levels, without its copies, which take as long as the decoding does.

    Args:
        size: of the image.
        least: the size that it may be reduced to, by a power of two.

    Returns:
        None where the file is damaged: Pillow says how, or takes it.
    """
    wanted = min(size.h // least.h, size.w // least.w)
    factor = next((factor for factor in (8, 4, 2) if wanted >= factor), 1)
    reduced = {"min_height": -(-size.h // factor), "min_width": -(-size.w // factor)}
    try:
        return simplejpeg.decode_jpeg(content, "RGB", **reduced)
    except ValueError:
        return None


def _upright(levels: Tensor, orientation: int) -> Tensor:
    """[C, h, w] as it lies in a file -> as it is seen."""
    if orientation >= 5:
        levels = levels.transpose(1, 2)
    flips = [axis for axis, those in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if orientation in those]
    return levels.flip(flips) if flips else levels


def _colour(background: str) -> tuple[int, ...]:
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise SettingsError(
            f"data.background={background}: no colour; give a name such as white, or #rrggbb"
        ) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits -> 8 bits; others as they are. Pillow itself would clip them to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    grey = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        white = 1.0 if grey.max() <= 1 else 255.0  # floating point images say nowhere what white is
    else:
        white = 65535.0
    light = white - grey if _white_is_zero(image) else grey
    levels = Image.fromarray((light / white * 255).round().clip(0, 255).astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        levels.putalpha(Image.fromarray(np.where(grey == transparent, 0, 255).astype(np.uint8)))
    levels.info["icc_profile"] = image.info.get("icc_profile")
    return levels


def _white_is_zero(image: Image.Image) -> bool:
    """Whether a TIFF counts from white to black; where it has 8 bits, Pillow turns it round by itself."""
    return image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0  # type: ignore[attr-defined]


def _srgb(image: Image.Image) -> Image.Image:
    """Through the embedded profile, if there is one, into sRGB; transparency is kept."""
    source = _foreign(image)
    if source is not None and image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    if source is None or image.mode not in ("RGB", "RGBA", "CMYK", "L", "LA"):
        return image
    alpha = image.getchannel("A") if image.mode.endswith("A") else None
    opaque = image.convert(image.mode.removesuffix("A")) if alpha else image
    try:
        converted = ImageCms.profileToProfile(opaque, source, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image  # one of another colour space: viewers ignore it too
    assert converted is not None
    if alpha is not None:
        converted.putalpha(alpha)
    elif "transparency" in image.info:
        converted.putalpha(image.convert("RGBA").getchannel("A"))
    return converted


def _foreign(image: Image.Image) -> ImageCms.ImageCmsProfile | None:
    """The embedded profile, unless it is sRGB or damaged, which viewers ignore too."""
    profile = image.info.get("icc_profile")
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return None if "sRGB" in ImageCms.getProfileDescription(source) else source
    except (ImageCms.PyCMSError, OSError):
        return None


def _grey(image: Image.Image) -> Image.Image:
    if image.mode == "L" and not image.has_transparency_data and "icc_profile" not in image.info:
        return image.copy()
    return _flat(_srgb(_eight_bit(image)), (0, 0, 0)).convert("L")


def _alpha(image: Image.Image) -> Image.Image:
    image = _eight_bit(image)
    if not image.has_transparency_data:
        return Image.new("L", image.size, 255)
    return image.convert("RGBA").getchannel("A")


def _flat(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """RGB, with transparent pixels laid over the colour."""
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*colour, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
