"""A denoiser that is given a mask and the masked picture beside the noisy latents, and what it needs around it."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from otl import rng
from otl.config import Inpaint, MaskResize, SampleOptions, SettingsError
from otl.datamodules import images, masks, views
from otl.datamodules.mask_files import LABEL, fits
from otl.methods import forms
from otl.types import Batch, Cond, Problem, Sample, Size

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

CHANNELS = 9  # noisy latents 4, mask 1, latents of the masked picture 4: in this order


class Canvas(NamedTuple):
    """A picture and the part of it that is to be painted."""

    pixels: Tensor  # [3, H, W] in -1..1
    mask: Tensor  # [1, H, W] of 0 and 1


def denoiser_input(module: DiffusionModule, noisy: Tensor, batch: Batch) -> Tensor:
    """[B, 4, h, w] noisy latents -> [B, 9, h, w]: mask and masked picture are put behind them.

    The masked picture is encoded from its pixels, unless the cache has it: a mask moved to the latents would leave
    traces of what it hides, since each of them sees many pixels.
    """
    assert batch.mask is not None, "an inpainting model is trained on batches with masks"
    masked = batch.masked
    if masked is None:
        assert batch.pixels is not None
        masked = encode_masked(module, batch.pixels, batch.mask)
    mask = shrunk(batch.mask, noisy.shape[-2:], module.inpaint_options.resize)
    return torch.cat([noisy, mask.to(noisy), masked.to(noisy)], dim=1)


@torch.no_grad()
def encode_masked(module: DiffusionModule, pixels: Tensor, mask: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 and [B, 1, H, W] -> [B, 4, h, w], latents of the pixels that the mask leaves."""
    return module.encode_image(masks.masked(pixels, mask, module.inpaint_options.fill))


def shrunk(mask: Tensor, size: tuple[int, ...], resize: MaskResize) -> Tensor:
    """[B, 1, H, W] -> [B, 1, h, w] of 0 and 1 by the nearest pixel, or in 0..1 by the share of each cell."""
    return functional.interpolate(mask, size=size, mode="nearest" if resize == MaskResize.nearest else "area")


def stock_pipeline(module: DiffusionModule) -> Any:
    """The stock inpainting pipeline of the family around the loaded parts."""
    accepted = inspect.signature(module.inpaint_pipeline_class).parameters
    own = dict(module.pipeline.config) | module.pipeline_options | module.pipeline.components
    return module.inpaint_pipeline_class(**{name: value for name, value in own.items() if name in accepted})


def check_data(module: DiffusionModule, data: Any) -> None:
    """Refuse a checkpoint that turns out to be another kind than the one that the data was made for.

    Raises:
        SettingsError: one hides parts of the images, and the other does not.
    """
    if module.inpaints and not data.hides:
        raise SettingsError(
            f"model.checkpoint={module.checkpoint}: its denoiser has {CHANNELS} input channels: this is an inpainting "
            "model, choose the model= of that kind (such as sd15_inpaint)"
        )
    if data.hides and not module.inpaints:
        raise SettingsError(
            f"model.checkpoint={module.checkpoint}: its denoiser takes no mask: choose the model= without _inpaint, or "
            "widen it with method=inpaint"
        )


def mask_options(module: DiffusionModule) -> Inpaint | None:
    """How the data makes its masks; None: there are none.

    Where they only weigh the loss they come from files, and an image without one counts whole.
    """
    if module.inpaints:
        return module.inpaint_options
    if module.loss_options.masked:
        return Inpaint(boxes=0.0, brushes=0.0, ellipses=0.0, whole=1.0)
    return None


def lacking_masks(module: DiffusionModule, samples: list[Sample]) -> list[Problem]:
    """Images without a mask where the loss is masked."""
    bare = [str(sample.path) for sample in samples if sample.mask is None]
    if not bare or module.inpaints or not module.loss_options.masked:
        return []
    if len(bare) == len(samples):
        message = (
            f"true, but no image has a mask (NAME{LABEL}.png beside it, data.mask_folder or data.mask_alpha), so that "
            "all would count whole; add masks, or set loss.masked=false"
        )
        return [Problem("loss.masked", message)]
    message = f"{len(bare)} of {len(samples)} images have no mask, and count whole"
    return [Problem("loss.masked", message, fatal=False, details=bare)]


def check_settings(module: DiffusionModule) -> None:
    """Refuse settings that would have no effect; the module is built, at least without weights.

    Raises:
        SettingsError: something is set for inpainting, and the denoiser takes no mask; or a mask without its picture.
    """
    if module.inpaints:
        return check_canvases(module.sample_options)
    forms.require_hole(
        module.inpaint_options,
        module.sample_options,
        family=type(module).__name__,
        checkpoint=module.checkpoint,
        there=module.inpaint_pipeline_class is not None,
    )


# What is drawn in


def sample(
    module: DiffusionModule,
    cond: Cond,
    uncond: Cond,
    canvases: list[Canvas],
    *,
    generators: list[torch.Generator],
    steps: int,
    guidance: float,
    size: Size,
) -> Tensor:
    """Conditionings of B prompts, and B canvases -> [B, C, h, w] latents, by the stock pipeline at full strength."""
    pixels = torch.stack([canvas.pixels for canvas in canvases]).to(module.device)
    mask = torch.stack([canvas.mask for canvas in canvases]).to(module.device)
    masked = encode_masked(module, pixels, mask)  # by the pipeline itself it would be a draw from the posterior
    module.pipeline.set_progress_bar_config(disable=True)
    return module.pipeline(
        **module.prompt_arguments(cond, uncond),
        image=pixels / 2 + 0.5,
        mask_image=mask,
        masked_image_latents=masked,
        strength=1.0,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generators,
        height=size.h,
        width=size.w,
        output_type="latent",
    ).images


def empty(size: Size) -> Canvas:
    """Nothing but hole: the whole picture is painted."""
    return Canvas(torch.zeros(3, *size), torch.ones(1, *size))


def canvases(options: SampleOptions, size: Size, background: str) -> list[Canvas] | None:
    """One for each prompt, from the files that the settings name; None where they name none.

    Raises:
        SettingsError: there are more or fewer than prompts, or one cannot be read.
    """
    check_canvases(options)
    if options.image is None:
        return None
    return [canvas(image, mask, size, background) for image, mask in pairs(options)]


def canvas(image: Path, mask: Path, size: Size, background: str) -> Canvas:
    """A picture cut to a size, and the mask that is cut with it.

    Raises:
        SettingsError: a file is not there, cannot be read, or the mask has another shape than the picture.
    """
    original = checked_size(image, mask)
    view = views.centred(original, size)
    return Canvas(images.pixels(image, view, background), masks.read(mask, view))


def checked_size(image: Path, mask: Path) -> Size:
    """The picture's size; the mask has the same shape. Raises SettingsError as `canvas`."""
    sizes = []
    for key, path in (("image", image), ("mask", mask)):
        try:
            sizes.append(images.header_size(path))
        except images.UNREADABLE as error:
            raise SettingsError(f"sample.{key}={path}: cannot be read ({error}); give another picture") from error
    original, own = sizes
    if not fits(own, original):
        raise SettingsError(
            f"sample.mask={mask}: {own} (height x width) does not have the shape of {image.name}, {original}"
        )
    return original


def first_canvas(sample: Sample, size: Size, background: str, *, options: Inpaint, seed: int) -> Canvas:
    """A training picture with its own mask, or with one generated from the seed that leaves something to see."""
    forms = (options.boxes, options.brushes, options.ellipses)
    partial = dataclasses.replace(options, whole=0.0) if any(forms) else options
    view = views.centred(sample.size, size)
    mask = masks.mask(sample, view, rng.key(seed, "sample mask"), partial)
    return Canvas(images.pixels(sample.path, view, background), mask)


def check_canvases(options: SampleOptions) -> None:
    """Headers only. Raises SettingsError: one cannot be used."""
    for image, mask in pairs(options):
        checked_size(image, mask)


def pairs(options: SampleOptions) -> list[tuple[Path, Path]]:
    """Picture and mask for each prompt; none where none are given."""
    if options.image is None:
        return []
    columns = []
    for value in (options.image, options.mask):
        paths = [Path(path).expanduser() for path in (value if isinstance(value, list) else [value])]
        columns.append(paths * len(options.prompts) if len(paths) == 1 else paths)
    return list(zip(*columns))
