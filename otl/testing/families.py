"""The family contract, one function for each property; for a plugin's own tests too, with or without pytest.

@pytest.mark.parametrize("check", CHECKS)
def test_the_contract(check):
    check(lambda: MyFamily("path/of/a/tiny/checkpoint"))
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from otl.config import LoraFormat, NoiseOptions, Output, SettingsError
from otl.formats.deltas import compare
from otl.formats.lora import kohya_key, read
from otl.formats.spellings import all_ends
from otl.methods.adapter import Adapter
from otl.methods.continuing import continued
from otl.methods.injected import base_weight, live_state
from otl.methods.loha import Loha
from otl.methods.lokr import Lokr
from otl.methods.lora import Dora, Lora
from otl.methods.oft import Oft
from otl.methods.parts import chosen_parts
from otl.methods.targets import layers, matching
from otl.modules.base import DiffusionModule
from otl.types import Batch, Cond, Size

Factory = Callable[[], DiffusionModule]
"""A new module each time, nothing loaded, with the smallest checkpoint there is."""

DECLARED = (
    *("part_names", "denoiser", "resolution", "bucket_step", "guidance", "lora_targets", "kohya_prefixes"),
    *("architecture", "base_model_version"),
)
ADAPTERS: dict[str, Callable[..., Adapter]] = {
    "lora": partial(Lora, rank=4, alpha=2.0),
    "dora": partial(Dora, rank=4, alpha=2.0),
    "loha": partial(Loha, rank=2, alpha=1.0),
    "lokr": partial(Lokr, rank=2, alpha=1.0, factor=4),
    "oft": partial(Oft, block_size=4),
}
CAPTIONS = ["a small red circle", "two tall trees in front of a house by the sea in the evening, a photograph"]
OTHERS = [CAPTIONS[0], "snow"]  # the first is the same
SMALLEST = 32  # pixels; sides of the pictures are at least this
ROUNDING = 1e-4  # of the largest number: what another order of the same sums may change
US = torch.tensor([0.3, 0.7], dtype=torch.float64)  # become the timesteps of a batch


def require(condition: bool, message: str) -> None:
    """`assert`, that python -O keeps."""
    if not condition:
        raise AssertionError(message)


def loaded(factory: Factory) -> DiffusionModule:
    module = factory()
    module.configure_model()
    return module


def adapt(module: DiffusionModule, method: Adapter | None = None, *, seed: int = 0) -> DiffusionModule:
    """Load with an adapter on every layer that takes one, its weights random: a new one would change nothing.

    Args:
        method: None: a LoRA.
    """
    module.method = method or Lora(rank=4, alpha=2.0)
    module.method.targets = "full"
    module.method.parts = chosen_parts(all_parts(module))
    module.configure_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def all_parts(module: DiffusionModule) -> dict[str, Any]:
    """`method.parts` of everything that takes an adapter."""
    return {part: {} for part in module.lora_targets}


def bucket(module: DiffusionModule) -> Size:
    """The smallest that is worth testing: its sides are consecutive multiples of the family's step."""
    steps = math.ceil(SMALLEST / module.bucket_step)
    return Size(steps * module.bucket_step, (steps + 1) * module.bucket_step)


def pictures(module: DiffusionModule, *, other: bool = False) -> Tensor:
    """Two random pictures [2, 3, H, W]; `other` has another second one."""
    size = bucket(module)
    seeds = (0, 2) if other else (0, 1)
    drawn = [torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn) * 2 - 1


def a_batch(module: DiffusionModule, *, other: bool = False) -> Batch:
    """Two pictures with their captions; `other` has another second sample."""
    size, second = bucket(module), int(other)
    return Batch(
        index=torch.tensor([0, 1 + second]),
        key=torch.tensor([5, 6 + second]),
        captions=OTHERS if other else CAPTIONS,
        original_size=torch.tensor([[480, 640], [1080 + 120 * second, 1920]]),
        crop=torch.tensor([[0, 12], [7 + second, 0]]),
        target_size=torch.tensor([list(size)] * 2),
        weight=torch.ones(2),
        pixels=pictures(module, other=other),
        mask=holes(size) if module.inpaints else None,
    )


def holes(size: Size) -> Tensor:
    """Masks [2, 1, H, W] of two pictures: a box, and everything."""
    mask = torch.ones(2, 1, *size)
    mask[0, :, size.h // 2 :] = 0
    return mask


def inputs(module: DiffusionModule, *, other: bool = False) -> tuple[Tensor, Tensor, Cond, Batch]:
    """What `predict` takes, of two samples; `other` has another second one."""
    batch = a_batch(module, other=other)
    noisy, cond = encoded(module, batch.pixels), prompted(module, batch.captions)
    t = module.noise_schedule.sample(torch.tensor([0.3, 0.5 if other else 0.7], dtype=torch.float64))
    return noisy, t, cond, batch


def first(batch: Batch) -> Batch:
    """Its first sample alone."""
    return batch._make(None if field is None else field[:1] for field in batch)


def on_meta(batch: Batch) -> Batch:
    """Its shapes alone."""
    return batch._make(field.to("meta") if isinstance(field, Tensor) else field for field in batch)


def encoded(module: DiffusionModule, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return module.encode_image(pixels)


def prompted(module: DiffusionModule, captions: list[str]) -> Cond:
    with torch.no_grad():
        return module.encode_prompt(captions)


def forward(module: DiffusionModule, noisy: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
    with torch.no_grad():
        return module.predict(module.denoiser_input(noisy, batch), t, cond, batch)


def backward(module: DiffusionModule) -> Tensor:
    """[2] losses of a batch, whose mean has gone backward; dropout, where there is, leaves out the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = module.losses(a_batch(module), u=US, stream="noise")
        losses.mean().backward()
    return losses.detach()


def factors(weighted_sum: Callable[[Tensor, Tensor, Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of latents and of noise in a schedule's `add` or `target`, each [B, 1, 1, 1] float64."""
    one, zero = torch.ones(len(t), 1, 1, 1, dtype=torch.float64), torch.zeros(len(t), 1, 1, 1, dtype=torch.float64)
    return weighted_sum(one, zero, t).double(), weighted_sum(zero, one, t).double()


def fits(module: DiffusionModule, predicted: Tensor, latents: Tensor) -> bool:
    """Whether a prediction has the shape that the family says."""
    b, channels, h, w = latents.shape
    return predicted.shape == (b, channels * (1 + module.learned_variance), h, w)


def nudge(module: DiffusionModule, name: str) -> None:
    """Change one weight of a part."""
    with torch.no_grad():
        next(module.part(name).parameters()).flatten()[0].add_(1.0)


def close(a: Tensor, b: Tensor, share: float = ROUNDING) -> bool:
    """Whether two tensors are equal up to rounding."""
    return a.shape == b.shape and difference(a, b) <= share


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by more than rounding at its smallest."""
    return a.shape != b.shape or difference(a, b) > 1e-6


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest number."""
    scale = a.double().abs().max().clamp(min=1e-12)
    return ((a.double() - b.double()).abs().max() / scale).nan_to_num(nan=math.inf).item()


# What a family declares


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


# Pictures and captions


def check_image_shape(factory: Factory) -> None:
    """Latents are [B, C, h, w] float32, finite, with the picture's aspect at every bucket."""
    module = loaded(factory)
    size = bucket(module)
    latents = encoded(module, pictures(module))
    require(latents.dim() == 4 and len(latents) == 2, f"2 pictures {size} become latents {tuple(latents.shape)}")
    require(latents.dtype == torch.float32, f"latents are {latents.dtype}; the cache and the noise are float32")
    require(bool(latents.isfinite().all()), "latents are not finite")
    h, w = latents.shape[-2:]
    require(
        h * size.w == w * size.h, f"a bucket of {size} becomes latents {h}x{w}: bucket_step={module.bucket_step} is off"
    )


def check_image_deterministic(factory: Factory) -> None:
    """The same picture has the same latents on every call: they are cached."""
    module = loaded(factory)
    first, second = encoded(module, pictures(module)), encoded(module, pictures(module))
    require(torch.equal(first, second), "the same pictures have other latents on the second call")


def check_image_batch(factory: Factory) -> None:
    """The latents of a picture do not depend on the others of its batch."""
    module = loaded(factory)
    one, two = pictures(module), pictures(module, other=True)
    both = encoded(module, one)
    require(close(both[0], encoded(module, two)[0]), "the first picture's latents depend on the second")
    require(close(both[:1], encoded(module, one[:1])), "a picture alone has other latents than in a batch")
    require(differ(both[1], encoded(module, two)[1]), "different pictures have the same latents")


def check_decode_shape(factory: Factory) -> None:
    """Decoding gives back finite pixels of the picture's size."""
    module = loaded(factory)
    pixels = pictures(module)
    with torch.no_grad():
        decoded = module.decode_image(encoded(module, pixels))
    require(decoded.shape == pixels.shape, f"pixels {tuple(pixels.shape)} come back as {tuple(decoded.shape)}")
    require(bool(decoded.isfinite().all()), "decoded pixels are not finite")


def check_prompt_shape(factory: Factory) -> None:
    """Conditioning is a flat dict of tensors, batch first, of one shape for any caption, the same on every call."""
    module = loaded(factory)
    cond = prompted(module, CAPTIONS)
    require(type(cond) is dict and len(cond) > 0, f"encode_prompt gives {type(cond).__name__}, not a filled dict")
    for key, value in cond.items():
        require(isinstance(value, Tensor), f"cond[{key!r}] is a {type(value).__name__}, not a tensor")
        require(value.dim() > 0 and len(value) == 2, f"cond[{key!r}] of 2 captions is {tuple(value.shape)}")
        require(not value.is_floating_point() or bool(value.isfinite().all()), f"cond[{key!r}] is not finite")
        require(torch.equal(value, prompted(module, CAPTIONS)[key]), f"cond[{key!r}] is another on the second call")
    for caption in ("", *CAPTIONS, "word " * 500):
        shapes = {key: value.shape[1:] for key, value in prompted(module, [caption]).items()}
        expected = {key: value.shape[1:] for key, value in cond.items()}
        require(shapes == expected, f"{caption[:30]!r} has conditioning {shapes}, other captions {expected}")


def check_prompt_batch(factory: Factory) -> None:
    """The conditioning of a caption does not depend on the others of its batch, and captions tell apart."""
    module = loaded(factory)
    both, others, alone = (prompted(module, captions) for captions in (CAPTIONS, OTHERS, CAPTIONS[:1]))
    for key, value in both.items():
        require(close(value[0], others[key][0]), f"cond[{key!r}] of a caption depends on the others of its batch")
        require(close(value[:1], alone[key]), f"cond[{key!r}] of a caption alone is another than in a batch")
    require(any(differ(value[1], others[key][1]) for key, value in both.items()), "different captions are the same")


def check_identities(factory: Factory) -> None:
    """The cache's keys: the same for the same weights, others when an encoder's weights change."""
    one, two = loaded(factory), loaded(factory)
    require(one.image_identity() == two.image_identity(), "image_identity changes from load to load")
    require(one.prompt_identity() == two.prompt_identity(), "prompt_identity changes from load to load")
    if two.image_encoder:
        nudge(two, two.image_encoder)
        require(one.image_identity() != two.image_identity(), f"image_identity does not see {two.image_encoder}")
    for name in two.text_encoders:
        before = two.prompt_identity()
        nudge(two, name)
        require(before != two.prompt_identity(), f"prompt_identity does not see {name}")


def check_encoders_load_alone(factory: Factory) -> None:
    """Without the denoiser's weights the encoders give what they give in a run: so is the cache filled ahead."""
    module, alone = loaded(factory), factory()
    alone.load_encoders()
    require(alone.image_identity() == module.image_identity(), "image_identity is another without the denoiser")
    require(alone.prompt_identity() == module.prompt_identity(), "prompt_identity is another without the denoiser")
    require(all(p.is_meta for p in alone.part("denoiser").parameters()), "load_encoders loads the denoiser, too")
    pixels = pictures(module)
    require(torch.equal(encoded(alone, pixels), encoded(module, pixels)), "latents are others without the denoiser")
    cond, other = prompted(module, CAPTIONS), prompted(alone, CAPTIONS)
    require(all(torch.equal(cond[key], other[key]) for key in cond), "conditioning is another without the denoiser")


# The denoiser


def check_predict_shape(factory: Factory) -> None:
    """The prediction has the latents' shape, twice the channels with a learned variance, and is finite."""
    module = loaded(factory)
    given = inputs(module)
    predicted = forward(module, *given)
    shapes = f"latents {tuple(given[0].shape)} -> prediction {tuple(predicted.shape)}"
    require(fits(module, predicted, given[0]), shapes)
    require(bool(predicted.isfinite().all()), "the prediction is not finite")


def check_predict_depends(factory: Factory) -> None:
    """The prediction depends on the noisy latents, on the timestep and on the caption."""
    module = loaded(factory)
    noisy, t, cond, batch = inputs(module)
    predicted = forward(module, noisy, t, cond, batch)
    require(differ(predicted, forward(module, noisy + 0.5, t, cond, batch)), "predict ignores the noisy latents")
    require(differ(predicted, forward(module, noisy, t.flip(0), cond, batch)), "predict ignores the timestep")
    flipped = {key: value.flip(0) for key, value in cond.items()}
    require(differ(predicted, forward(module, noisy, t, flipped, batch)), "predict ignores the conditioning")


def check_predict_batch(factory: Factory) -> None:
    """The prediction of a sample does not depend on the others of its batch."""
    module = loaded(factory)
    noisy, t, cond, batch = inputs(module)
    both = forward(module, noisy, t, cond, batch)
    others = forward(module, *inputs(module, other=True))
    require(close(both[0], others[0]), "the prediction of the first sample depends on the second")
    alone = (noisy[:1], t[:1], {key: value[:1] for key, value in cond.items()}, first(batch))
    require(close(both[:1], forward(module, *alone)), "a sample alone has another prediction than in a batch")


def check_gradient_checkpointing(factory: Factory) -> None:
    """model.gradient_checkpointing changes the memory, not the loss or the gradients."""
    plain, saving = factory(), factory()
    saving.gradient_checkpointing = True
    found = []
    for module in (plain, saving):
        adapt(module)
        module.train()
        loss = backward(module)
        found.append((loss, {name: p.grad for name, p in module.trained_parameters().items() if p.grad is not None}))
    (loss, gradients), (other, recomputed) = found
    require(close(loss, other), f"the loss is {loss.tolist()}, with gradient_checkpointing {other.tolist()}")
    require(gradients.keys() == recomputed.keys(), "with gradient_checkpointing some weights get no gradient")
    wrong = [name for name in gradients if not close(gradients[name], recomputed[name], 1e-2)]
    require(not wrong, f"gradient_checkpointing changes the gradient of {len(wrong)} weights, such as {wrong[:1]}")


def check_bf16(factory: Factory) -> None:
    """Frozen weights in bf16, adapters in fp32: it trains and draws, also where nothing is autocast."""
    module = factory()
    module.dtype_name = "bf16"
    adapt(module)
    for name in module.part_names:
        expected = torch.float32 if name == module.image_encoder else torch.bfloat16
        wrong = [
            f"{key} is {p.dtype}"
            for key, p in module.part(name).named_parameters()
            if p.dtype != (torch.float32 if p.requires_grad else expected)
        ]
        require(not wrong, f"with dtype=bf16, {len(wrong)} weights of {name} have another dtype: {wrong[:1]}")
    losses = backward(module)
    require(bool(losses.isfinite().all()), f"with dtype=bf16 the losses are {losses.tolist()}")
    module.draw(CAPTIONS[:1], [0], steps=2, guidance=2.0, size=bucket(module))


# Noise and loss


def check_noise_recoverable(factory: Factory) -> None:
    """From the noisy latents and a perfect prediction the latents come back."""
    schedule = loaded(factory).noise_schedule
    t = schedule.sample(US)
    require(t.shape == US.shape, f"sample gives timesteps {tuple(t.shape)} for {tuple(US.shape)}")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    signal, sigma = factors(schedule.add, t)
    of_latents, of_noise = factors(schedule.target, t)
    noisy, target = schedule.add(latents, noise, t), schedule.target(latents, noise, t)
    require(close(noisy, signal * latents + sigma * noise), "add is no weighted sum of latents and noise")
    require(close(target, of_latents * latents + of_noise * noise), "target is no weighted sum of latents and noise")
    determinant = signal * of_noise - sigma * of_latents
    require(bool((determinant.abs() > 1e-6).all()), "latents cannot be told from the noisy latents and the target")
    back = (of_noise * noisy - sigma * target) / determinant
    require(close(back, latents), "noisy latents and target do not give back the latents")


def check_noise_snr(factory: Factory) -> None:
    """snr is (signal / noise) squared of what add does, and falls as u grows."""
    schedule = loaded(factory).noise_schedule
    u = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    t = schedule.sample(u)
    signal, sigma = factors(schedule.add, t)
    ratio, expected = schedule.snr(t).double().flatten(), (signal / sigma).square().flatten()
    off = ((ratio - expected).abs() / expected.clamp(min=1e-9)).max().item()
    require(off < 1e-3, f"snr is off by {off:.1%} from what add does: {ratio.tolist()} for {expected.tolist()}")
    require(bool((ratio.diff() <= 0).all()), "a larger u must mean more noise")


def check_noise_shares(factory: Factory) -> None:
    """share takes sample back, what is predicted has a name, and the settings' range is left to the base class."""
    schedule = loaded(factory).noise_schedule
    require(
        schedule.prediction in ("epsilon", "v_prediction", "sample", "flow"),
        f"prediction is {schedule.prediction!r}; accepted are epsilon, v_prediction, sample and flow",
    )
    u = torch.linspace(0.05, 0.85, 9, dtype=torch.float64)
    off = (schedule.share(schedule.sample(u)) - u).abs().max().item()
    require(off < 0.01, f"share(sample(u)) is off from u by {off:.3f}")
    module = factory()
    module.noise_options = NoiseOptions(min_timestep=0.25, max_timestep=0.5)
    module.configure_model()
    require(
        torch.equal(module.noise_schedule.sample(u), schedule.sample(u)),
        "make_noise must not look at noise.min_timestep: DiffusionModule.losses applies the range",
    )


def check_loss(factory: Factory) -> None:
    """One finite loss for each sample, times its weight."""
    module = loaded(factory)
    batch = a_batch(module)
    with torch.no_grad():
        losses = module.losses(batch, u=US, stream="noise")
        doubled = module.losses(batch._replace(weight=2 * batch.weight), u=US, stream="noise")
    require(losses.shape == (2,), f"2 samples have losses {tuple(losses.shape)}")
    require(bool(losses.isfinite().all()) and bool((losses > 0).all()), f"losses are {losses.tolist()}")
    require(close(doubled, 2 * losses), "the samples' weights do not multiply their losses")


# Training, files and plans


def check_gradients(factory: Factory) -> None:
    """Gradients reach every adapter of the denoiser, some of each text encoder, and nothing else."""
    module = adapt(factory())
    backward(module)
    own = {id(parameter) for parameter in module.trained_parameters().values()}
    require(own == {id(p) for group in module.groups for p in group.params}, "the groups are not what trains")
    for name in module.part_names:
        parameters = dict(module.part(name).named_parameters())
        extra = [key for key, p in parameters.items() if "lora_" not in key and (p.requires_grad or p.grad is not None)]
        require(not extra, f"{name}.{(extra or [''])[0]} is not of the adapter and yet gets a gradient")
        reached = {key: p.grad is not None and bool(p.grad.any()) for key, p in parameters.items() if "lora_" in key}
        if name in module.lora_targets:
            require(any(reached.values()), f"no gradient reaches {name}: is it called under no_grad?")
        missed = [key for key, reaches in reached.items() if not reaches]
        if name == module.denoiser:
            require(not missed, f"no gradient reaches {len(missed)} weights of {name}, such as {missed[:1]}")


def check_state_dict(factory: Factory) -> None:
    """A checkpoint holds the trained weights only, and loading it brings them back."""
    module = adapt(factory())
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    frozen = [name for name in state if "lora_" not in name]
    require(not frozen, f"state_dict holds {len(frozen)} frozen weights, such as {frozen[:1]}")
    adapters = sum(p.requires_grad for name in module.part_names for p in module.part(name).parameters())
    require(len(state) == adapters, f"state_dict holds {len(state)} of {adapters} trained weights")
    other = adapt(factory(), seed=1)
    other.load_state_dict(state, strict=other.strict_loading)
    require(all(torch.equal(other.state_dict()[name], state[name]) for name in state), "weights do not come back")


def check_lora_file(factory: Factory) -> None:
    """The file of every kind of adapter has each adapted layer under its part's name, and what goes on from it is the
    same; that of a LoRA in PEFT's names too."""
    plain = loaded(factory)
    for name, make in ADAPTERS.items():
        method = make()
        module = adapt(factory(), method)
        live = live_state(module)
        for style in LoraFormat if name == "lora" else (LoraFormat.kohya,):
            what = f"the {name} file in {style.value}'s names"
            module.output_options = Output(format=style, dtype="fp32")
            with tempfile.TemporaryDirectory() as folder:
                file = module.export(Path(folder) / "adapter")
                require_keys(module, file, what, style, layers=sum(map(len, live.values())))
                again = continued(plain, file, method.continues)
            off = compare(live, again, partial(base_weight, module))
            require(off < ROUNDING, f"going on from {what} is off by {off:.1e}")


def require_keys(module: DiffusionModule, file: Path, what: str, style: LoraFormat, *, layers: int) -> None:
    """The file has so many layers, all of them below the names of the family's parts, and the family's header."""
    starts = {
        LoraFormat.kohya: tuple(kohya_key(module.kohya_prefixes[part], "") for part in module.lora_targets),
        LoraFormat.peft: tuple(f"{part}." for part in module.lora_targets),
    }
    tensors, header = read(file)
    alien = [key for key in tensors if not key.startswith(starts[style])]
    require(not alien, f"{what} has {alien[:1]}, which belongs to no part")
    stems = {key.removesuffix(next((end for end in all_ends() if key.endswith(end)), ".alpha")) for key in tensors}
    require(len(stems) == layers, f"{what} has {len(stems)} of {layers} layers")
    require(header["modelspec.architecture"] == f"{module.architecture}/lora", "the header names another model")


def check_skeleton_shapes(factory: Factory) -> None:
    """The skeleton has the loaded parts' parameters, on the meta device."""
    module, skeleton = loaded(factory), factory()
    skeleton.build_skeleton()
    for name in module.part_names:
        own, planned = (
            {key: tuple(p.shape) for key, p in each.part(name).named_parameters()} for each in (module, skeleton)
        )
        wrong = sorted(own.items() ^ planned.items())
        require(not wrong, f"{name} loads with other weights than build_skeleton plans, such as {wrong[:1]}")
        real = [key for key, p in skeleton.part(name).named_parameters() if p.device.type != "meta"]
        require(not real, f"build_skeleton makes weights: {name}.{(real or [''])[0]} is not on the meta device")


def check_skeleton_runs(factory: Factory) -> None:
    """task=plan measures activations on the skeleton: encoding and predicting run on the meta device."""
    skeleton = factory()
    skeleton.build_skeleton()
    skeleton.to("meta")
    batch = on_meta(a_batch(skeleton))
    with torch.no_grad():
        latents = skeleton.encode_image(batch.pixels)
        cond = skeleton.encode_prompt(CAPTIONS)
        noisy = skeleton.denoiser_input(latents, batch)
        predicted = skeleton.predict(noisy, torch.zeros(2, dtype=torch.long, device="meta"), cond, batch)
    require(fits(skeleton, predicted, latents), f"on meta, {tuple(latents.shape)} -> {tuple(predicted.shape)}")


def check_draw(factory: Factory) -> None:
    """A picture of the size asked for: the same for the same prompt and seed, another for another seed."""
    module = loaded(factory)
    size = bucket(module)
    drawn = [module.draw(CAPTIONS[:1], [seed], steps=2, guidance=2.0, size=size)[0] for seed in (0, 0, 1)]
    require(drawn[0].size == (size.w, size.h), f"asked for {size}, drawn {drawn[0].size[1]}x{drawn[0].size[0]}")
    require(drawn[0].tobytes() == drawn[1].tobytes(), "the same prompt and seed are another picture on the second call")
    require(drawn[0].tobytes() != drawn[2].tobytes(), "two seeds draw one picture")


CHECKS = (
    check_declared,
    check_constructor_only_stores,
    check_loads_frozen,
    check_presets_find_layers,
    check_image_shape,
    check_image_deterministic,
    check_image_batch,
    check_decode_shape,
    check_prompt_shape,
    check_prompt_batch,
    check_identities,
    check_encoders_load_alone,
    check_predict_shape,
    check_predict_depends,
    check_predict_batch,
    check_gradient_checkpointing,
    check_bf16,
    check_noise_recoverable,
    check_noise_snr,
    check_noise_shares,
    check_loss,
    check_gradients,
    check_state_dict,
    check_lora_file,
    check_skeleton_shapes,
    check_skeleton_runs,
    check_draw,
)


def check_family(factory: Factory) -> None:
    """Every check of CHECKS; one AssertionError tells of all that fail."""
    errors = {check.__name__: error for check in CHECKS if (error := failure(check, factory)) is not None}
    if errors:
        listed = "\n".join(f"  {name}: {type(error).__name__}: {error}" for name, error in errors.items())
        first = next(iter(errors.values()))
        raise AssertionError(f"{len(errors)} of {len(CHECKS)} checks of the family fail:\n{listed}") from first


def failure(check: Callable[[Factory], None], factory: Factory) -> Exception | None:
    try:
        check(factory)
    except Exception as error:
        return error
    return None
