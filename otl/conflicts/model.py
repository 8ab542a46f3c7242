"""What the settings ask of a model and its schedule does not give, as far as sources and configs say: without torch.

Each check is the function that the run itself calls once the model is built, of plain values. They come from the class
attributes of the family and from the configs of the checkpoint's folder, or else from those that ship with OTL.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from otl import agreement
from otl.config import Inpaint, Problem, SampleOptions, Sampler, SettingsError, as_problem, assets_dir
from otl.datamodules import shapes
from otl.declared import declared, descends, written_in
from otl.formats.objects import parsed
from otl.methods import forms, specs
from otl.sources import Unclear

CASCADE = "otl.modules.cascaded.CascadedModule"
NO_FP16 = "otl.modules.stable_cascade.StableCascade"
INPAINT = "otl.methods.inpaint.Inpaint"
SCHEDULER = "scheduler_config.json"
MASKED_CHANNELS = 9  # of a denoiser that is fed a mask and the masked picture
PLANNED = {f"otl.tasks.{name}.{name}" for name in ("train", "plan")}  # tasks that build the model to train it


class Model:
    """What is known of the model that the settings name."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.target: str = settings["_target_"]
        self.settings, self.family = settings, self.target.rpartition(".")[2]

    def __getattr__(self, name: str) -> Any:
        """A class attribute of the family. Raises Unclear: its source does not tell."""
        return declared(self.target, name)

    @cached_property
    def folder(self) -> Path:
        """Where the configs are: those of the checkpoint, or those that ship."""
        folder = Path(str(self.settings.get("checkpoint"))).expanduser()
        whole = (folder / "model_index.json").is_file() and not descends(self.target, CASCADE)
        return folder if whole else assets_dir() / "configs" / (self.settings.get("config") or self.config_name)

    def config(self, part: str, name: str = "config.json") -> dict[str, Any]:
        """The config of a network, or another file of its folder. Raises Unclear: there is none that can be read."""
        path = self.folder / part / name
        try:
            return parsed(path.read_bytes(), str(path))
        except (OSError, SettingsError) as error:
            raise Unclear(str(path)) from error

    @cached_property
    def room(self) -> int:
        """Tokens of a prompt, its ends aside. Raises Unclear: there is no tokenizer of that name, or it says none."""
        if self.prompt_tokens:
            return int(self.prompt_tokens)
        length = self.config("tokenizer", "tokenizer_config.json").get("model_max_length")
        if not isinstance(length, int):
            raise Unclear(f"{self.folder}: model_max_length")
        return length - 2

    @cached_property
    def schedule(self) -> agreement.Schedule:
        """Raises Unclear: the family makes it in a way of its own."""
        if not written_in(self.target, "make_noise").startswith("otl."):
            raise Unclear(f"{self.target}.make_noise")
        config, zero = self.config("scheduler", SCHEDULER), self.settings.get("zero_terminal_snr")
        return agreement.Schedule(
            prediction=self.settings.get("prediction") or config.get("prediction_type", "epsilon"),
            discrete="beta_schedule" in config,  # else a cosine over a continuous time
            pure=bool(config.get("rescale_betas_zero_snr") if zero is None else zero),
            karras=bool(config.get("use_karras_sigmas")),
        )


Check = Callable[[Model, dict[str, Any]], None]


def of_model(settings: dict[str, Any], wrong: Collection[str] = ()) -> Iterator[Problem]:
    """What does not go with the model.

    Args:
        wrong: settings with a problem already, whose values are not to be trusted.
    """
    given, task = settings.get("model") or {}, settings.get("task") or {}
    if not isinstance(given.get("_target_"), str) or task.get("_target_") not in PLANNED:
        return
    model = Model(given)
    for check, read in READ.items():
        if any(_overlap(key, name) for key in wrong for name in ("model", *read)):
            continue
        try:
            check(model, settings)
        except Unclear:
            continue  # told when the model is built
        except SettingsError as error:
            yield as_problem(error)


def _overlap(key: str, name: str) -> bool:
    """Whether one of two settings, or beginnings of names, lies in the other."""
    return key.startswith(name) or name.startswith(f"{key}.")


def check_networks(model: Model, settings: dict[str, Any]) -> None:
    """The sizes that the checkpoint's folder says."""
    for part in model.part_names:
        agreement.require_size(model.config(part), where=str(model.folder / part / "config.json"))


def check_prediction(model: Model, settings: dict[str, Any]) -> None:
    zero = model.settings.get("zero_terminal_snr")
    agreement.require_prediction(model.schedule.prediction, model.predictions, zero_snr=zero, family=model.family)


def check_weight(model: Model, settings: dict[str, Any]) -> None:
    agreement.require_weight(settings["loss"]["weight"], model.schedule.prediction)


def check_noise(model: Model, settings: dict[str, Any]) -> None:
    if settings["noise"]["offset_generalized"]:
        agreement.require_offset(pure=model.schedule.pure)


def check_sampler(model: Model, settings: dict[str, Any]) -> None:
    sample = settings["sample"]
    agreement.require_sampler(sample["sampler"], sample["timestep_spacing"], model.schedule, family=model.family)


def check_steps(model: Model, settings: dict[str, Any]) -> None:
    """Where pictures are drawn, also of a class."""
    sample, concepts = settings["sample"], settings["data"]["concepts"].values()
    if not sample["prompts"] and not any(concept.get("generate") for concept in concepts):
        return
    config, changed = model.config("scheduler", SCHEDULER), ("prediction", "zero_terminal_snr")
    by_ddim = any(model.settings.get(name) is not None for name in changed)
    agreement.require_steps(
        sample["steps"],
        sample["sampler"] or (Sampler.ddim if by_ddim else config.get("_class_name")),
        timesteps=config.get("num_train_timesteps") if model.schedule.discrete else None,
        alone=model.single_step,
        family=model.family,
    )


def check_decoders(model: Model, settings: dict[str, Any]) -> None:
    """Of the cascades, where pictures are drawn."""
    sample = settings["sample"]
    if sample["prompts"] and descends(model.target, CASCADE):
        agreement.require_decoder(model.settings.get("decoder"))
        agreement.require_sides(sample["height"], sample["width"], step=model.bucket_step)


def check_precision(model: Model, settings: dict[str, Any]) -> None:
    if descends(model.target, NO_FP16):
        agreement.require_no_fp16((settings.get("trainer") or {}).get("precision"))


def check_masks(model: Model, settings: dict[str, Any]) -> None:
    """What is set for inpainting."""
    method = (settings.get("method") or {}).get("_target_")
    try:
        there = model.inpaint_pipeline_class is not None
    except Unclear:
        there = True  # a class: no constant
    if not isinstance(method, str) or descends(method, INPAINT):
        return
    if there and model.config(model.denoiser).get("in_channels") == MASKED_CHANNELS:
        return
    forms.require_hole(
        Inpaint(**settings["inpaint"]),
        SampleOptions(**settings["sample"]),
        family=model.family,
        checkpoint=str(model.settings.get("checkpoint")),
        there=there,
    )


def check_vectors(model: Model, settings: dict[str, Any]) -> None:
    """Whether a prompt has room for the new words."""
    for each in specs.parse((settings.get("method") or {}).get("embeddings")).values():
        if each.vectors:
            specs.require_room(each, each.vectors, room=model.room)


def check_buckets(model: Model, settings: dict[str, Any]) -> None:
    """Sizes that are none of the family's, and resolutions without a bucket or with the same ones."""
    data = settings["data"]
    concepts = {name: SimpleNamespace(**concept) for name, concept in data["concepts"].items()}
    asked = SimpleNamespace(**data | {"concepts": concepts})
    resolution = model.settings.get("native_resolution") or model.resolution
    for each in shapes.shown_at(asked, resolution, model.bucket_step):
        shapes.ladder(asked, each, model.bucket_step)


READ: dict[Check, tuple[str, ...]] = {  # check -> what it reads beside the model, by the beginnings of names
    check_networks: (),
    check_prediction: (),
    check_weight: ("loss.weight",),
    check_noise: ("noise.offset",),
    check_sampler: ("sample.sampler", "sample.timestep_spacing"),
    check_steps: ("sample.steps", "sample.sampler", "sample.prompts", "data.concepts"),
    check_decoders: ("sample.prompts", "sample.height", "sample.width"),
    check_precision: ("trainer.precision",),
    check_masks: ("method", "inpaint", "sample"),
    check_vectors: ("method",),
    check_buckets: ("data.resolution", "data.concepts", "data.bucket", "data.min_bucket", "data.max_bucket"),
}
