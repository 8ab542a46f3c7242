"""Pictures and captions: what a family's encoders make of them, and the keys of the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from otl.modules.base import DiffusionModule
from otl.testing.comparing import close, differ, require
from otl.testing.inputs import CAPTIONS, OTHERS, Factory, bucket, encoded, loaded, pictures, prompted


def nudge(module: DiffusionModule, name: str) -> None:
    """Change one weight of a part."""
    with torch.no_grad():
        next(module.part(name).parameters()).flatten()[0].add_(1.0)


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
