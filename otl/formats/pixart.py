"""PixArt Alpha's names in the original code, whose attention has one weight for queries, keys and values."""

from __future__ import annotations

# Of diffusers' scripts/convert_pixart_to_diffusers.py.
OUTSIDE_BLOCKS = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.linear": "proj_out",
}
IN_BLOCK = {
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"],
    "cross_attn.q_linear": ["attn2.to_q"],
    "cross_attn.kv_linear": ["attn2.to_k", "attn2.to_v"],
    "cross_attn.proj": ["attn2.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
}
BLOCKS = "transformer_blocks."


def original_names(paths: list[str]) -> dict[str, list[str]]:
    """The original code's paths -> those of the layers in diffusers' transformer whose weights they hold, in order."""
    blocks = dict.fromkeys(path.removeprefix(BLOCKS).partition(".")[0] for path in paths if path.startswith(BLOCKS))
    names = {name: [path] for name, path in OUTSIDE_BLOCKS.items()}
    for block in blocks:
        for name, inner in IN_BLOCK.items():
            names[f"blocks.{block}.{name}"] = [f"{BLOCKS}{block}.{layer}" for layer in inner]
    return {name: stacked for name, stacked in names.items() if set(stacked) <= set(paths)}
