"""The numbers that settings take."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from otl.config import Problem
from otl.epochs import ACCEPTED, is_stop
from otl.signatures import Unknown
from otl.wording import as_number, as_whole, show

LARGEST_SEED = 2**32 - 1  # of numpy
LARGEST_OF_TORCH = 2**64 - 1


@dataclass(frozen=True)
class Range:
    """The numbers that a setting takes."""

    low: float
    high: float = float("inf")
    multiple: int = 1
    low_excluded: bool = False
    high_excluded: bool = False
    or_epochs: bool = False  # whether `3 epochs` is accepted too
    whole: bool = False  # no fraction, where the type does not say so
    or_share: bool = False  # whether a share below 1 is accepted beside whole numbers
    single: bool = False  # neither a list nor null, where the type does not say so
    also: int | None = None  # one more that is accepted, and means something else

    def accepts(self, value: float) -> bool:
        if value == self.also:
            return True
        if not math.isfinite(value):
            return False
        if self.whole and not isinstance(value, int):
            return False
        if self.or_share and value > 1 and value % 1 != 0:
            return False
        above = value > self.low if self.low_excluded else value >= self.low
        below = value < self.high if self.high_excluded else value <= self.high
        return above and below and (self.multiple == 1 or value % self.multiple == 0)

    def __str__(self) -> str:
        text = "a whole number, " if self.whole else "a share below 1 or a whole number, " if self.or_share else ""
        text += f"{'above' if self.low_excluded else 'at least'} {_written(self.low)}"
        if self.high != float("inf"):
            text += f" and {'below' if self.high_excluded else 'at most'} {_written(self.high)}"
        text += f", a multiple of {self.multiple}" if self.multiple > 1 else ""
        text += ", or whole epochs: 1 epoch, 3 epochs" if self.or_epochs else ""
        return text if self.also is None else f"{text}, or {self.also}"


def _written(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


SHARE = Range(0, 1)
COUNT = Range(1)
POSITIVE = Range(0, low_excluded=True)
STOP = replace(POSITIVE, or_epochs=True, or_share=True)
PIXELS = Range(64, 16384, multiple=8, whole=True)
BATCHES = Range(0, or_share=True)
TURN, HALF_TURN = Range(-180, 180), Range(0, 180)
AUGMENT = {
    **dict.fromkeys(("flip", "crop_jitter", "resize_jitter", "brightness", "contrast", "saturation"), SHARE),
    **dict.fromkeys(("rotation", "hue"), HALF_TURN),
    **dict.fromkeys(("fixed_rotation", "fixed_hue"), TURN),
    **dict.fromkeys(("fixed_brightness", "fixed_contrast", "fixed_saturation"), Range(0)),
}
RANGES = {  # `*` stands for one name
    "data.resolution": PIXELS,
    "data.min_bucket_side": Range(64),
    "data.max_bucket_side": Range(64),
    "data.min_side": COUNT,
    "data.max_aspect": Range(1),
    "data.warn_crop": SHARE,
    "data.warn_upscale": COUNT,
    "data.batch_size": COUNT,
    "data.encode_batch_size": COUNT,
    "data.workers": Range(0),
    "data.image_variations": COUNT,
    **{f"data.augment.{name}": accepted for name, accepted in AUGMENT.items()},
    **{f"data.concepts.*.augment.{name}": accepted for name, accepted in AUGMENT.items()},
    "data.caption_dropout": SHARE,
    "data.caption_variants": COUNT,
    "data.captions.keep": Range(0),
    "data.captions.tag_dropout": SHARE,
    "data.captions.capitals": SHARE,
    "data.concepts.*.captions.keep": Range(0),
    "data.concepts.*.captions.tag_dropout": SHARE,
    "data.concepts.*.captions.capitals": SHARE,
    "data.validation_share": Range(0, 1, high_excluded=True),
    "data.max_megapixels": POSITIVE,
    "data.concepts.*.validation_share": Range(0, 1, high_excluded=True),
    "data.concepts.*.repeats": POSITIVE,
    "data.concepts.*.samples": COUNT,
    "data.concepts.*.resolution": PIXELS,
    "data.concepts.*.seed": Range(0),
    "data.concepts.*.loss_weight": Range(0),
    "data.concepts.*.generate": Range(0),
    "loss.gamma": POSITIVE,
    "loss.huber_delta": POSITIVE,
    "loss.mix.*": Range(0),
    "loss.unmasked_weight": SHARE,
    "loss.unmasked_probability": SHARE,
    "noise.offset": Range(0),
    "noise.multires_iterations": Range(0),
    "noise.multires_discount": Range(0, 1, low_excluded=True),
    "noise.perturbation": Range(0),
    "noise.logit_std": POSITIVE,
    "noise.mode_scale": Range(-1, 1.75),
    "noise.beta_alpha": Range(0.1, 100),
    "noise.beta_beta": Range(0.1, 100),
    "noise.shift": POSITIVE,
    "noise.min_timestep": SHARE,
    "noise.max_timestep": SHARE,
    "inpaint.boxes": Range(0),
    "inpaint.brushes": Range(0),
    "inpaint.ellipses": Range(0),
    "inpaint.whole": Range(0),
    "inpaint.min_area": SHARE,
    "inpaint.max_area": SHARE,
    "inpaint.fill": Range(-1, 1),
    "sample.seeds": Range(0, LARGEST_OF_TORCH),
    "sample.steps": COUNT,
    "sample.guidance": Range(0),
    "sample.batch_size": COUNT,
    "sample.height": PIXELS,
    "sample.width": PIXELS,
    "task.batch_size": COUNT,
    "task.timesteps": COUNT,
    "task.worst": COUNT,
    "task.smooth": Range(0),
    "task.unmasked": Range(0, 1, high_excluded=True),
    "task.alpha": SHARE,
    "captioner.max_tokens": COUNT,
    "captioner.beams": COUNT,
    "captioner.general_threshold": SHARE,
    "captioner.character_threshold": SHARE,
    "masker.threshold": SHARE,
    "masker.tolerance": Range(0, 255),
    "masker.side": COUNT,
    "masker.std": POSITIVE,
    "task.sheet_pages": Range(0),
    "seed": Range(0, LARGEST_SEED),
    "model.chunks": COUNT,
    "model.clip_skip": Range(0, 10),  # CLIP-L has 12 layers
    "model.native_resolution": PIXELS,
    "model.p2_gamma": Range(0),
    "method.rank": COUNT,
    "method.block_size": Range(2),
    "method.factor": Range(2, also=-1),
    "method.alpha": POSITIVE,
    "method.parts.*.lr": Range(0),
    "method.parts.*.rank": COUNT,
    "method.parts.*.alpha": POSITIVE,
    "method.parts.*.stop_after": STOP,
    "method.dropout": Range(0, 1, high_excluded=True),
    "method.embeddings.*.vectors": COUNT,
    "method.embeddings.*.lr": Range(0),
    "method.embeddings.*.stop_after": STOP,
    "optimizer.lr": Range(0, single=True),
    "optimizer.weight_decay": Range(0, single=True),
    "optimizer.eps": Range(0),
    "optimizer.betas": Range(0, 1, high_excluded=True),
    "optimizer.d0": POSITIVE,
    "optimizer.d_coef": POSITIVE,
    "optimizer.beta3": Range(0, 1, high_excluded=True),
    "optimizer.d": Range(1),
    "optimizer.beta2_decay": Range(-1, 0),
    "optimizer.momentum": Range(0, 1, high_excluded=True),
    "optimizer.min_8bit_size": Range(0),
    "scheduler.warmup": BATCHES,
    "scheduler.end": Range(0),
    "trainer.max_steps": Range(1, whole=True),
    "trainer.max_epochs": COUNT,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": Range(0),
    "trainer.val_check_interval": Range(1, whole=True),
    **{f"trainer.limit_{name}_batches": BATCHES for name in ("train", "test", "predict")},
    "trainer.limit_val_batches": Range(1, whole=True),
    "trainer.num_nodes": COUNT,
    "trainer.check_val_every_n_epoch": COUNT,
    "trainer.min_epochs": Range(0),
    "trainer.min_steps": Range(0),
    "trainer.reload_dataloaders_every_n_epochs": Range(0),
    "task.days": COUNT,
    "callbacks.*.every": COUNT,
    "callbacks.checkpoint.keep": COUNT,
    "callbacks.checkpoint.every_minutes": POSITIVE,
    "callbacks.checkpoint.every_epochs": COUNT,
    "callbacks.checkpoint.wait": Range(0),
    "callbacks.guard.skips_in_a_row": Range(0),
    "callbacks.guard.skips": Range(0),
    "callbacks.ema.decay": Range(0, 1, high_excluded=True),
}


def out_of_range(settings: dict[str, Any]) -> Iterator[Problem]:
    """Numbers that are not accepted."""
    leaves = dict(_leaves(settings, ""))
    for pattern, accepted in RANGES.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        for key, value in leaves.items():
            if expression.fullmatch(key):
                for full, number in [(key, value)] if accepted.single else _each(key, value):
                    yield from _check_number(full, number, accepted)


def _leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        full = f"{prefix}.{key}".lstrip(".")
        yield full, value
        if isinstance(value, dict):
            yield from _leaves(value, full)


def _each(key: str, value: Any) -> list[tuple[str, Any]]:
    """A value, or those of a list, each with its name; null is none."""
    if isinstance(value, list):
        return [(f"{key}[{index}]", each) for index, each in enumerate(value) if each is not None]
    return [] if value is None else [(key, value)]


def _check_number(key: str, value: Any, accepted: Range) -> list[Problem]:
    if value is Unknown or (accepted.or_epochs and isinstance(value, str) and is_stop(value)):
        return []
    if not isinstance(value, int | float) or isinstance(value, bool):
        number = as_number(value) if isinstance(value, str) else None
        if number is not None:
            return [Problem(key, f"{value!r} is text in YAML: write {number!r}")]
        return [Problem(key, f"{show(value)} is not {ACCEPTED if accepted.or_epochs else 'a number'}")]
    if accepted.accepts(value):
        return []
    return [Problem(key, f"{value} is not accepted: must be {accepted}{as_whole(value) if accepted.whole else ''}")]
