"""What the files of adapters mean, by the formulas that were published with each kind."""

from __future__ import annotations

import torch
from torch import Tensor


def published(tensors: dict[str, Tensor], weight: Tensor, *, reader: str = "comfyui") -> Tensor:
    """What one layer of a file under kohya's and LyCORIS's names adds to its weight.

    Args:
        tensors: of this layer, by the end of their keys.
        weight: the frozen one.
        reader: of a DoRA: ComfyUI divides by the frozen rows' lengths, LyCORIS by the adapted ones'.
    """
    t = {name: tensor.double() for name, tensor in tensors.items()}
    w = weight.double()
    alpha = t["alpha"].item()
    if "lora_down.weight" in t:
        down, up = t["lora_down.weight"], t["lora_up.weight"]
        delta = (up.flatten(1) @ down.flatten(1)).view_as(w) * alpha / len(down)
        if "dora_scale" not in t:
            return delta
        lengths = (w if reader == "comfyui" else w + delta).flatten(1).pow(2).sum(1).sqrt()
        return t["dora_scale"] * (w + delta) / lengths.view_as(t["dora_scale"]) - w
    if "hada_w1_a" in t:
        rank = len(t["hada_w1_b"])
        products = [merged(t[f"hada_w{i}_a"], t[f"hada_w{i}_b"], t.get(f"hada_t{i}")).reshape(w.shape) for i in (1, 2)]
        return alpha / rank * products[0] * products[1]
    if "oft_blocks" in t:
        return rotated(t["oft_blocks"], w) - w
    return kronecker(t, alpha, w)


def merged(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """The product of two factors, through a core of rank x rank x kernel where there is one."""
    return a @ b if t is None else torch.einsum("pqhw,po,qi->oihw", t, a, b)


def kronecker(t: dict[str, Tensor], alpha: float, w: Tensor) -> Tensor:
    rank = next((len(t[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in t), None)
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    second = t["lokr_w2"] if "lokr_w2" in t else merged(t["lokr_w2_a"], t["lokr_w2_b"], t.get("lokr_t2"))
    second = second.reshape(second.shape[0], -1, *w.shape[2:])
    blocks = [[first[i, j] * second for j in range(first.shape[1])] for i in range(first.shape[0])]
    product = torch.cat([torch.cat(row, dim=1) for row in blocks])
    return product * (1 if rank is None else alpha / rank)


def rotated(blocks: Tensor, w: Tensor) -> Tensor:
    """Cayley's rotation of the outputs, as one matrix."""
    q = torch.block_diag(*(block - block.T for block in blocks))
    one = torch.eye(len(q), dtype=q.dtype)
    r = (one + q) @ torch.linalg.inv(one - q)
    return (r.T @ w.flatten(1)).view_as(w)
