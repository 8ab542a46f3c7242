"""A whole pipeline as a diffusers folder that older versions of diffusers and transformers read too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from otl.config import SettingsError
from otl.formats import stored
from otl.formats.files import whole_folder
from otl.formats.lora import portable_text_path

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_pipeline(
    pipeline: Any, path: Path, *, dtype: str, weights: Mapping[str, Mapping[str, Tensor]] | None = None
) -> Path:
    """Write the folder aside, read every weight back, compare, and only then put it in place.

    Args:
        pipeline: a diffusers pipeline.
        path: the folder; what an earlier call wrote there is replaced.
        dtype: of the weights in the files: "fp32", "fp16" or "bf16".
        weights: of the networks that have none in the pipeline, by their names there.

    Raises:
        SettingsError: `path` exists and is no pipeline folder.
        RuntimeError: what is read back is not what was written.
    """
    if path.exists() and not (path / "model_index.json").is_file():
        raise SettingsError(f"{path} exists and is not a model folder: it is left alone; choose another output.name")
    weights = weights or {}
    networks = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    needs = sum(tensor.numel() for network in networks for tensor in network.parameters()) * DTYPES[dtype].itemsize
    with whole_folder(path, needs=needs) as aside:
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                own = weights[name] if name in weights else component.state_dict()
                save_part(component, own, aside / name, dtype=DTYPES[dtype])
            elif name.startswith("tokenizer"):
                save_tokenizer(component, aside / name)
            elif component is not None:
                component.save_pretrained(aside / name)
        pipeline.save_config(aside)
    return path


def save_part(part: Any, weights: Mapping[str, Tensor], folder: Path, *, dtype: torch.dtype) -> None:
    """config.json and the weights of one network, as older versions name them, verified."""
    folder.mkdir(parents=True)
    if hasattr(part.config, "to_json_file"):  # transformers
        part.config.save_pretrained(folder)
        file = folder / "model.safetensors"
        weights = stored.renamed(weights, {portable_text_path(name): name for name in weights})
    else:
        part.save_config(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
    stored.write(file, weights, {"format": "pt"}, dtype=dtype)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json for transformers 5; CLIP's vocab.json and merges.txt or T5's spiece.model for transformers 4."""
    tokenizer.save_pretrained(folder)
    fast = folder / "tokenizer.json"
    model = json.loads(fast.read_text())["model"] if fast.is_file() else {}
    if model.get("type") == "BPE":
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    elif model.get("type") == "Unigram" and getattr(tokenizer, "vocab_file", None):  # else the checkpoint had none
        shutil.copyfile(tokenizer.vocab_file, folder / "spiece.model")
