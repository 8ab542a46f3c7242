"""What a run needs in memory: counted on the meta device, where nothing is computed; an estimate, and called one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from otl.config import MaskSource
from otl.methods.rows import Rows
from otl.modules import inpainting
from otl.modules.base import DiffusionModule
from otl.types import Batch, Cond, Size

# Bytes of state per trained parameter. Adafactor keeps rows and columns of the squares only.
OPTIMIZER_BYTES = {"AdamW": 8.0, "AdamW8bit": 2.1, "Adafactor": 0.1, "Prodigy": 16.0, "Lion": 4.0, "SGD": 0.0}
UNKNOWN_OPTIMIZER = 8.0


class FlashAttention(torch.autograd.Function):
    """Attention as the fused kernels do it: only its inputs and its output are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Attention modelled as the fused kernel for the time of the block."""
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, key, value, *_, **__: FlashAttention.apply(query, key, value)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


class Encoded(NamedTuple):
    """What the cache holds, in bytes."""

    pixel: float  # of each pixel of an image, its mask counted
    caption: int

    @classmethod
    def of(cls, module: DiffusionModule, size: Size, latents: Tensor, cond: Cond) -> Encoded:
        """Of images of one size that a skeleton has encoded, in whatever dtype."""
        masked, dtypes = inpainting.mask_options(module), module.part_dtypes()
        numbers = latents[0].numel()
        if masked is not None and not module.inpaints:
            numbers += latents[0, 0].numel()  # a mask in the latents' size
        elif masked is not None and masked.masks == MaskSource.files:
            numbers *= 2  # under its mask, too
        text = dtypes.get(module.text_encoders[0], dtypes["default"])
        sizes = (
            each[0].numel() * (text if each.is_floating_point() else each.dtype).itemsize for each in cond.values()
        )
        return cls(torch.float32.itemsize * numbers / size.area, sum(sizes))


def of_step(module: DiffusionModule, size: Size, batch_size: int, *, dtype: torch.dtype) -> tuple[int, Encoded]:
    """Bytes that one step keeps for its backward pass, and of what is cached; the module must be a skeleton."""
    for name in module.part_names:
        module.part(name).to(dtype)
    module.to("meta")
    module.train()
    batch = empty_batch(size, batch_size)
    with torch.no_grad():
        assert batch.pixels is not None
        latents = module.encode_image(batch.pixels.to(dtype)).to(dtype)
        cond = module.encode_prompt(batch.captions)
        noisy = module.denoiser_input(latents, batch)
    own = {
        parameter.untyped_storage()._cdata for name in module.part_names for parameter in module.part(name).parameters()
    }
    kept: dict[int, Tensor] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage()._cdata
        if address not in own:
            kept.setdefault(address, tensor)
        return tensor

    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module.predict(noisy, torch.zeros(batch_size, dtype=torch.long, device="meta"), cond, batch)
    kept_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return kept_bytes, Encoded.of(module, size, latents, cond)


def empty_batch(size: Size, count: int) -> Batch:
    """A batch of shapes only."""
    pairs = torch.zeros(count, 2, dtype=torch.long, device="meta")
    numbers = torch.zeros(count, dtype=torch.long, device="meta")
    return Batch(
        index=numbers,
        key=numbers,
        captions=[""] * count,
        original_size=pairs,
        crop=pairs,
        target_size=pairs,
        weight=torch.ones(count, device="meta"),
        pixels=torch.zeros(count, 3, size.h, size.w, device="meta"),
        mask=torch.zeros(count, 1, size.h, size.w, device="meta"),
    )


def weights(module: DiffusionModule) -> list[dict[str, Any]]:
    """One row for each part: the checkpoint's own parameters and their bytes in the dtype they are kept in, how many
    train, and apart from them what the method adds: adapters and new words, always in fp32."""
    dtypes = module.part_dtypes()
    rows = []
    for name in module.part_names:
        part = module.part(name)
        new = added(module, part)
        total = sum(p.numel() for p in part.parameters() if id(p) not in new)
        dtype = dtypes.get(name, dtypes["default"])
        rows.append(
            {
                "part": name,
                "parameters": total,
                "trained": sum(p.numel() for p in part.parameters() if p.requires_grad),
                "dtype": str(dtype).removeprefix("torch."),
                "bytes": total * dtype.itemsize,
                "added": sum(new.values()),
                "added_bytes": sum(new.values()) * 4,
            }
        )
    return rows


def added(module: DiffusionModule, part: nn.Module) -> dict[int, int]:
    """id -> size of the parameters that are the method's and not the checkpoint's."""
    new = [p for rows in part.modules() if isinstance(rows, Rows) for p in rows.new_parameters()]
    if module.method is not None and not module.method.whole_parts:
        new += [p for p in part.parameters() if p.requires_grad]
    return {id(p): p.numel() for p in new}


def estimate(
    module: DiffusionModule,
    *,
    optimizer: str,
    size: Size,
    batch_size: int,
    keeps_encoders: bool,
    encodes_masked: bool = False,
) -> tuple[dict[str, Any], Encoded]:
    """Bytes by kind for one step at the largest bucket; and of what is cached.

    Args:
        optimizer: class name.
        keeps_encoders: whether the encoders stay beside the denoiser during training.
        encodes_masked: whether the image encoder does: it encodes masked images in every step.
    """
    rows = weights(module)
    trained = sum(row["trained"] for row in rows)
    needed = {module.denoiser, module.image_encoder} if encodes_masked else {module.denoiser}
    stays = [r for r in rows if keeps_encoders or r["part"] in needed or r["trained"]]
    activations, encoded = of_step(module, size, batch_size, dtype=module.autocast_dtype or torch.float32)
    found = {
        "weights": sum(row["bytes"] + row["added_bytes"] for row in stays),
        "gradients": trained * 4,
        "optimizer": round(trained * OPTIMIZER_BYTES.get(optimizer, UNKNOWN_OPTIMIZER)),
        "activations": activations,
    }
    return found | {"total": sum(found.values()), "estimate": True}, encoded
