"""The numbers, choices and paths that settings take, and what only makes sense together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from otl.augmentation import without_effect
from otl.config import ARCHIVES, MANIFESTS, TABLES, Inpaint, Loss, NoiseOptions, Problem, assets_dir
from otl.epochs import ACCEPTED, is_stop
from otl.signatures import Unknown
from otl.urls import hub_hint, is_url, unreadable
from otl.wording import as_number, meant, show

DATA_TASKS = {f"otl.tasks.{name}.{name}" for name in ("train", "plan", "cache", "caption", "mask", "rank")}
CACHE = "otl.tasks.cache.cache"
REPEAT = "otl.tasks.repeat.repeat"
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16", "fp32", "fp16", 32, 16)
STRATEGIES = (  # Lightning's names; others, such as ModelParallelStrategy, are given by trainer.strategy._target_
    "auto",
    *("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook"),
    *(
        f"{kind}_find_unused_parameters_{each}"
        for kind in ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
        for each in ("true", "false")
    ),
    *("fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload"),
    *("deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme"),
    *("single_device", "single_xla", "xla_debug", "xla", "single_tpu"),
)
CHOICES: dict[str, tuple[Any, ...]] = {
    "output.dtype": ("fp32", "fp16", "bf16"),
    "trainer.precision": PRECISIONS,
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.strategy": (None, *STRATEGIES),
    "trainer.profiler": (None, "simple", "advanced", "pytorch", "xla"),
    "trainer.gradient_clip_algorithm": (None, "norm", "value"),
}
WORDED = {"trainer.devices": "at least 1; auto or -1: all; a list: numbers of GPUs from 0"}  # ranges that need words


@dataclass(frozen=True)
class Range:
    """The numbers that a setting takes."""

    low: float
    high: float = float("inf")
    multiple: int = 1
    low_excluded: bool = False
    high_excluded: bool = False
    or_epochs: bool = False  # whether `3 epochs` is accepted too
    whole: bool = False  # where the type does not say so
    also: int | None = None  # one more that is accepted, and means something else

    def accepts(self, value: float) -> bool:
        if value == self.also:
            return True
        if not math.isfinite(value):
            return False
        if self.whole and value % 1 != 0:
            return False
        above = value > self.low if self.low_excluded else value >= self.low
        below = value < self.high if self.high_excluded else value <= self.high
        return above and below and (self.multiple == 1 or value % self.multiple == 0)

    def __str__(self) -> str:
        text = "a whole number, " if self.whole else ""
        text += f"above {self.low:g}" if self.low_excluded else f"at least {self.low:g}"
        if self.high != float("inf"):
            text += f" and {'below' if self.high_excluded else 'at most'} {self.high:g}"
        text += f", a multiple of {self.multiple}" if self.multiple > 1 else ""
        text += ", or whole epochs: 1 epoch, 3 epochs" if self.or_epochs else ""
        return text if self.also is None else f"{text}, or {self.also}"


SHARE = Range(0, 1)
COUNT = Range(1)
POSITIVE = Range(0, low_excluded=True)
STOP = replace(POSITIVE, or_epochs=True)
PIXELS = Range(64, multiple=8)
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
    "sample.seeds": Range(0),
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
    "seed": Range(0),
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
    "optimizer.lr": Range(0),
    "optimizer.weight_decay": Range(0),
    "optimizer.eps": Range(0),
    "optimizer.betas": Range(0, 1, high_excluded=True),
    "optimizer.d0": POSITIVE,
    "scheduler.warmup": Range(0),
    "scheduler.end": Range(0),
    "trainer.max_steps": COUNT,
    "trainer.max_epochs": COUNT,
    "trainer.accumulate_grad_batches": COUNT,
    "trainer.gradient_clip_val": Range(0),
    "trainer.val_check_interval": Range(1, whole=True),
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


def _word(value: Any) -> Any:
    """A choice by its name, anything else as it is."""
    return value.name if isinstance(value, Enum) else value


def _mixed(loss: dict[str, Any]) -> bool:
    return any(loss.get("mix", {}).values())


def _huber(loss: dict[str, Any]) -> bool:
    return bool(loss["mix"]["huber"]) if _mixed(loss) else _word(loss.get("type")) == "huber"


def _scheduled(loss: dict[str, Any]) -> bool:
    return _huber(loss) and _word(loss.get("huber_schedule")) != "constant"


def _timesteps(name: str) -> tuple[str, Callable[[dict[str, Any]], bool]]:
    return f"noise.timesteps={name}", lambda noise: _word(noise.get("timesteps")) == name


# Parameter -> what it is of no use without, and whether that is given.
LOSS_PARAMETERS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "huber_delta": ("loss.type=huber or loss.mix.huber", _huber),
    "huber_schedule": ("loss.type=huber or loss.mix.huber", _huber),
    "gamma": ("loss.weight=min_snr or p2", lambda loss: _word(loss.get("weight")) in {"min_snr", "p2"}),
    "unmasked_weight": ("loss.masked=true", lambda loss: bool(loss.get("masked"))),
    "unmasked_probability": ("loss.masked=true", lambda loss: bool(loss.get("masked"))),
    "normalize_masked_area": ("loss.masked=true", lambda loss: bool(loss.get("masked"))),
}
NOISE_PARAMETERS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "offset_random_strength": ("noise.offset above 0", lambda noise: bool(noise.get("offset"))),
    "offset_generalized": ("noise.offset above 0", lambda noise: bool(noise.get("offset"))),
    "multires_discount": ("noise.multires_iterations above 1", lambda noise: noise.get("multires_iterations") != 0),
    "logit_mean": _timesteps("logit_normal"),
    "logit_std": _timesteps("logit_normal"),
    "mode_scale": _timesteps("heavy_tail"),
    "beta_alpha": _timesteps("beta"),
    "beta_beta": _timesteps("beta"),
}
GENERATED = "inpaint.masks=generated or both", lambda inpaint: _word(inpaint.get("masks")) != "files"
INPAINT_PARAMETERS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    **dict.fromkeys(("boxes", "brushes", "ellipses", "whole", "min_area", "max_area"), GENERATED),
}
TASK_PARAMETERS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "separator": ("task.mode=append or prepend", lambda task: task.get("mode") in {"append", "prepend"}),
    "alpha": ("task.mode=blend", lambda task: task.get("mode") == "blend"),
}
PARAMETERS = (
    ("loss", Loss, LOSS_PARAMETERS),
    ("noise", NoiseOptions, NOISE_PARAMETERS),
    ("inpaint", Inpaint, INPAINT_PARAMETERS),
    ("task", partial(SimpleNamespace, separator=None, alpha=None), TASK_PARAMETERS),
)


def out_of_range(settings: dict[str, Any]) -> Iterator[Problem]:
    """Ranges, choices, and what only makes sense together."""
    leaves = dict(_leaves(settings, ""))
    for pattern, accepted in RANGES.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))
        for key, value in leaves.items():
            if expression.fullmatch(key):
                for full, number in _each(key, value):
                    yield from _check_number(full, number, accepted)
    for key, choices in CHOICES.items():
        if key in leaves and leaves[key] is not Unknown and leaves[key] not in choices:
            names = list(dict.fromkeys(map(show, choices)))
            message = f"{show(leaves[key])} is not accepted: must be {', '.join(names)}{meant(leaves[key], names)}"
            yield Problem(key, message)
    low, high = leaves.get("noise.min_timestep"), leaves.get("noise.max_timestep")
    if isinstance(low, int | float) and isinstance(high, int | float) and low >= high:
        yield Problem("noise.min_timestep", f"{low} is not below noise.max_timestep={high}: nothing would be trained")
    yield from _check_objective(settings)
    yield from without_effect(settings.get("data") or {})
    yield from _check_inpaint(settings.get("inpaint") or {})
    yield from _check_canvases(settings.get("sample") or {})
    yield from _check_colours(settings)
    yield from _check_masker(settings.get("masker") or {})
    yield from _check_devices((settings.get("trainer") or {}).get("devices", 1))
    yield from _check_paths(settings)


def _check_objective(settings: dict[str, Any]) -> Iterator[Problem]:
    """What of the loss, the noise and the masks would have no effect beside the other settings."""
    for group, kind, parameters in PARAMETERS:
        given, defaults = settings.get(group) or {}, kind()
        for name, (needed, used) in parameters.items():
            value = given.get(name)
            changed = value is not Unknown and name in given and _word(value) != _word(getattr(defaults, name))
            if changed and not used(given):
                yield Problem(f"{group}.{name}", f"{show(_word(value))} would have no effect: it needs {needed}")
    loss = settings.get("loss") or {}
    if _mixed(loss) and _word(loss.get("type")) != "mse":
        message = f"{_word(loss['type'])} would have no effect: loss.mix says which distances count; leave one out"
        yield Problem("loss.type", message)
    if _scheduled(loss) and loss.get("huber_delta") == 1:
        message = "a schedule goes from 1 to loss.huber_delta, so that with 1 it would have no effect: lower it"
        yield Problem("loss.huber_delta", message)
    if (settings.get("noise") or {}).get("multires_iterations") == 1:
        message = "1 is the noise itself, without any coarser one: give 0 for none, or 2 and more"
        yield Problem("noise.multires_iterations", message)


def _check_inpaint(inpaint: dict[str, Any]) -> Iterator[Problem]:
    """Masks that cannot be made."""
    shares = [inpaint.get(form) for form in ("boxes", "brushes", "ellipses", "whole")]
    if all(share == 0 for share in shares):
        yield Problem("inpaint.whole", "boxes, brushes, ellipses and whole are all 0: give at least one a share")
    low, high = inpaint.get("min_area"), inpaint.get("max_area")
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        yield Problem("inpaint.min_area", f"{low} is above inpaint.max_area={high}")


def _check_canvases(sample: dict[str, Any]) -> Iterator[Problem]:
    """The pictures that are painted in."""
    for key in ("image", "mask"):
        value = sample.get(key)
        for path in value if isinstance(value, list) else [value]:
            if path is None or path is Unknown:
                continue
            if not isinstance(path, str):
                yield Problem(f"sample.{key}", f"{show(path)} is not accepted: give a path, or a list of paths")
            elif not Path(path).expanduser().is_file():
                yield Problem(f"sample.{key}", f"{path}: there is no such file")


def _leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        full = f"{prefix}.{key}".lstrip(".")
        if isinstance(value, dict):
            yield from _leaves(value, full)
        else:
            yield full, value


def _each(key: str, value: Any) -> list[tuple[str, Any]]:
    """A value, or those of a list, each with its name; none for null."""
    if isinstance(value, list):
        return [(f"{key}[{index}]", each) for index, each in enumerate(value)]
    return [] if value is None else [(key, value)]


def _check_number(key: str, value: Any, accepted: Range) -> list[Problem]:
    if value is Unknown or (accepted.or_epochs and isinstance(value, str) and is_stop(value)):
        return []
    if not isinstance(value, int | float) or isinstance(value, bool):
        number = as_number(value) if isinstance(value, str) else None
        if number is not None:
            return [Problem(key, f"{value!r} is text in YAML: write {number!r}")]
        return [Problem(key, f"{show(value)} is not {ACCEPTED if accepted.or_epochs else 'a number'}")]
    return [] if accepted.accepts(value) else [Problem(key, f"{value} is not accepted: must be {accepted}")]


def _check_colours(settings: dict[str, Any]) -> Iterator[Problem]:
    """The one under transparent pixels, and those that become masks."""
    given = {"data.background": (settings.get("data") or {}).get("background", "white")}
    given |= _each("masker.colours", (settings.get("masker") or {}).get("colours"))
    for key, colour in given.items():
        if colour in {"white", "black"} or colour is Unknown:
            continue
        from PIL import ImageColor  # only here: the usual colours need no import

        try:
            ImageColor.getrgb(colour)
        except ValueError:
            hint = meant(colour, list(ImageColor.colormap))
            yield Problem(key, f"{colour} is no colour: give a name such as white, or #rrggbb{hint}")


def _check_masker(masker: dict[str, Any]) -> Iterator[Problem]:
    """What is to be white, where that is asked for."""
    for name, such in (("prompts", "[a dog]"), ("colours", "[lime]")):
        if masker.get(name) == []:
            yield Problem(f"masker.{name}", f"there are none; name what is to be white, such as 'masker.{name}={such}'")


def _check_devices(devices: Any) -> Iterator[Problem]:
    """A number of devices or the numbers of some, as a list or with commas between them."""
    if devices in (Unknown, None, "auto"):
        return
    listed = isinstance(devices, list) or (isinstance(devices, str) and "," in devices)
    numbers = devices if isinstance(devices, list) else [each for each in str(devices).split(",") if each.strip()]
    if not numbers or not all(_is_device(each, listed=listed) for each in numbers):
        yield Problem("trainer.devices", f"{show(devices)} is not accepted: must be {WORDED['trainer.devices']}")


def _is_device(number: Any, *, listed: bool) -> bool:
    """Whether that is a GPU's number where they are listed, or a number of devices."""
    if isinstance(number, bool) or not re.fullmatch(r"\s*-?\d+\s*", str(number)):
        return False
    return int(number) >= 0 if listed else int(number) >= 1 or int(number) == -1


def _check_paths(settings: dict[str, Any]) -> Iterator[Problem]:
    """The folders and files that have to be there."""
    data = settings.get("data", {})
    concepts = {name: each for name, each in data.get("concepts", {}).items() if each.get("enabled", True)}
    places = {
        f"data.concepts.{name}.path": concept.get("path") for name, concept in concepts.items() if not _drawn(concept)
    }
    places["data.path"] = data.get("path")
    task = (settings.get("task") or {}).get("_target_")
    if task == CACHE:
        yield from _check_cache(settings["task"], data)
    needs_images = task in DATA_TASKS and not (task == CACHE and settings["task"].get("action") != "fill")
    if needs_images and not data.get("path") and not data.get("concepts"):
        ways = "data.path=photos/ or data.concepts.NAME.path=photos/"
        yield Problem(
            "data.path",
            f"{show(data.get('path')) or 'nothing'} is given, but this task reads images: give their folder, {ways}",
        )
    for key, path in places.items():
        if isinstance(path, str) and path:
            yield from _check_source(key, path)
    for key, group in {"data": data, **{f"data.concepts.{name}": each for name, each in concepts.items()}}.items():
        if isinstance(group.get("mask_folder"), str) and task != "otl.tasks.mask.mask":  # which makes it
            yield from _check_folder(f"{key}.mask_folder", group["mask_folder"])
    yield from _check_config(settings.get("model") or {})
    name = (settings.get("output") or {}).get("name")
    if isinstance(name, str) and (Path(name).name != name or name.startswith(".")):
        yield Problem("output.name", f"{name!r} is no plain file name: results stay in the run's folder, hydra.run.dir")
    resume = settings.get("resume")
    if isinstance(resume, str) and resume != "auto" and not Path(resume).expanduser().exists():
        yield Problem("resume", f"{resume} does not exist: give a checkpoint, auto (the run's newest) or null")
    yield from _check_manifest(settings.get("manifest"), repeats=task == REPEAT)


def _check_config(model: dict[str, Any]) -> Iterator[Problem]:
    """The description of a checkpoint's networks, which ships with OTL."""
    config, own = model.get("config"), str(model.get("_target_")).startswith("otl.")
    folder = assets_dir() / "configs"
    if own and isinstance(config, str) and not (folder / config).is_dir():
        there = sorted(path.name for path in folder.iterdir())
        yield Problem("model.config", f"{config} is none of {', '.join(there)}{meant(config, there)}")


def _drawn(concept: dict[str, Any]) -> bool:
    """Whether a concept's folder is made when its class images are drawn."""
    images, path = concept.get("generate"), concept.get("path")
    return isinstance(images, int) and images > 0 and isinstance(path, str) and not Path(path).expanduser().exists()


def _check_cache(task: dict[str, Any], data: dict[str, Any]) -> Iterator[Problem]:
    """What would have no effect on the cache."""
    for name, idle in (("delete", False), ("days", None)):
        if task.get(name, idle) != idle and task.get("action") != "prune":
            yield Problem(f"task.{name}", f"{show(task[name])} would have no effect: it needs task.action=prune")
    if task.get("action") == "fill" and data.get("cache") is False:
        yield Problem("data.cache", "false, so that no run of these settings would read what task=cache makes")


def _check_manifest(manifest: Any, *, repeats: bool) -> Iterator[Problem]:
    """The manifest of the run to repeat."""
    if repeats and not manifest:
        yield Problem("manifest", "must be given: task=repeat needs that of a run, manifest=RUN/manifest.json")
    elif manifest and not repeats:
        yield Problem("manifest", f"{show(manifest)} would have no effect: it needs task=repeat")
    elif isinstance(manifest, str) and not Path(manifest).expanduser().is_file():
        yield Problem("manifest", f"{manifest} does not exist: give the manifest.json of a run")


def _check_source(key: str, text: str) -> list[Problem]:
    """A folder of images, a file that lists or holds some, or the URL of one."""
    if is_url(text):
        reason = unreadable(text)
        return [Problem(key, f"{text}: {reason}")] if reason else []
    if re.search(r"[*?]", text):
        return []
    accepted = (*ARCHIVES, *TABLES, *MANIFESTS)
    path = Path(text).expanduser()
    if not path.is_file():
        return [replace(problem, message=problem.message + hub_hint(text)) for problem in _check_folder(key, text)]
    if path.suffix.lower() in accepted:
        return []
    return [Problem(key, f"{text} is a file: give the folder it is in, or a file of images: {', '.join(accepted)}")]


def _check_folder(key: str, text: str) -> list[Problem]:
    path = Path(text).expanduser()
    if path.is_dir():
        return []
    if path.exists():
        return [Problem(key, f"{text} is a file: give the folder it is in")]
    there = [entry.name for entry in path.absolute().parent.glob("*/")] if path.absolute().parent.is_dir() else []
    return [Problem(key, f"{text} does not exist (looked for {path.absolute()}){meant(path.name, there)}")]
