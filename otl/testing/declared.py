"""What a family says of itself, and how it arrives."""

from __future__ import annotations

from otl.config import SettingsError
from otl.methods.targets import layers, matching
from otl.testing.comparing import require
from otl.testing.inputs import Factory, loaded

DECLARED = (
    *("part_names", "denoiser", "resolution", "bucket_step", "guidance", "lora_targets", "kohya_prefixes"),
    *("architecture", "base_model_version"),
)


def check_declared(factory: Factory) -> None:
    """The class attributes are there and agree with each other."""
    family = type(factory())
    missing = [name for name in DECLARED if not hasattr(family, name)]
    require(not missing, f"{family.__name__} does not declare {', '.join(missing)}")
    parts = set(family.part_names)
    require(family.denoiser in parts, f"denoiser={family.denoiser} is not in part_names {family.part_names}")
    require(set(family.text_encoders) <= parts, f"text_encoders {family.text_encoders} are not all in part_names")
    require(family.image_encoder in parts | {""}, f'image_encoder={family.image_encoder} is no part, nor "" for none')
    adapted = set(family.lora_targets)
    require(adapted <= parts, f"lora_targets names {sorted(adapted - parts)}, which are not in part_names")
    require(family.denoiser in adapted, f"lora_targets has nothing for the denoiser, {family.denoiser}")
    presets = {part: set(family.lora_targets[part]) for part in adapted}
    same = all(names == presets[family.denoiser] for names in presets.values())
    require(same, f"method.targets means all parts at once, but they have different presets: {presets}")
    prefixes = family.kohya_prefixes
    require(adapted <= set(prefixes), f"kohya_prefixes lacks {sorted(adapted - set(prefixes))}")
    require(len(set(prefixes.values())) == len(prefixes), f"two parts have one prefix in a LoRA file: {prefixes}")
    require(
        family.resolution % family.bucket_step == 0,
        f"resolution={family.resolution} is no multiple of bucket_step={family.bucket_step}",
    )


def check_constructor_only_stores(factory: Factory) -> None:
    """A wrong setting is found before anything is loaded."""
    require(factory().pipeline is None, "the constructor loads; load in configure_model (load_pipeline)")


def check_loads_frozen(factory: Factory) -> None:
    """After configure_model every part is there with finite weights, frozen, and nothing of it trains."""
    module = loaded(factory)
    for name in module.part_names:
        for key, parameter in module.part(name).named_parameters():
            require(not parameter.requires_grad, f"{name}.{key} arrives trainable")
            require(parameter.device.type != "meta", f"{name}.{key} has no weights")
            require(bool(parameter.isfinite().all()), f"{name}.{key} is not finite")
        require(not module.part(name).training, f"{name} arrives in training mode")
    registered = [name for name, _ in module.named_parameters()]
    require(not registered, f"Lightning sees {registered[:1]} before a method trains it: keep parts in the pipeline")


def check_presets_find_layers(factory: Factory) -> None:
    """Every preset of every part matches a layer."""
    module = loaded(factory)
    for part, presets in module.lora_targets.items():
        for preset in presets:
            try:
                matching({part: layers(module.part(part))}, preset, {part: presets})
            except SettingsError as error:
                raise AssertionError(f"the preset {preset} of {part}: {error}") from error
