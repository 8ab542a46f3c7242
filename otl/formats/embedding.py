"""Files of embeddings: vectors for words, under the keys that ComfyUI, A1111, Forge, kohya, OneTrainer and diffusers
read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from otl.config import SettingsError
from otl.formats import files
from otl.formats.files import listed
from otl.formats.modelspec import PREDICTIONS, SPEC, with_hash
from otl.types import Size

ALONE = "emb_params"  # the key of a file with the vectors of one text encoder
OUT = "_out"  # ends the key of vectors that are put in after the text encoder; OneTrainer's
SPELLINGS = {"t5xxl": ("t5xxl", "t5")}  # ComfyUI's, OneTrainer's
BUNDLE = "bundle_emb"
TOLERANCE = {"fp32": 1e-6, "fp16": 2e-3, "bf16": 1e-2}  # relative error that rounding to the dtype explains
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Vectors = dict[str, Tensor]
"""text encoder -> [n, D], one row for each vector."""


def to_file(vectors: Vectors, *, keys: dict[str, str], output: bool) -> dict[str, Tensor]:
    """The vectors under their keys in a file.

    Args:
        keys: text encoder -> key.
        output: whether they are put in after the text encoder.
    """
    return {keys[encoder] + (OUT if output else ""): tensor for encoder, tensor in vectors.items()}


def to_bundle(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of a file under the keys by which a LoRA file carries them along.

    A single tensor has A1111's key: ComfyUI looks for it whatever the model, and for others by the encoder's name.
    """
    inner = {"string_to_param.*" if key == ALONE else key: tensor for key, tensor in tensors.items()}
    return {f"{BUNDLE}.{name}.{key}": tensor for key, tensor in inner.items()}


def bundle_keys(tensors: Iterable[str]) -> list[str]:
    """The keys of a LoRA file under which it carries embeddings."""
    return [key for key in tensors if key.startswith(f"{BUNDLE}.")]


def from_bundle(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The embedding `name` of a LoRA file, or the only one; all of `tensors` where it carries none."""
    carried: dict[str, dict[str, Tensor]] = {}
    for key in bundle_keys(tensors):
        owner, _, inner = key.removeprefix(f"{BUNDLE}.").partition(".")
        carried.setdefault(owner, {})[ALONE if inner.startswith("string_to_param.") else inner] = tensors[key]
    if not carried:
        return tensors
    if name not in carried and len(carried) > 1:
        raise SettingsError(f"the file carries the embeddings {', '.join(carried)}, none of them called {name}")
    return carried.get(name) or next(iter(carried.values()))


def from_file(tensors: dict[str, Tensor], *, keys: dict[str, str], widths: dict[str, int], output: bool) -> Vectors:
    """The vectors of each text encoder.

    Args:
        tensors: of a file.
        keys: text encoder -> the key that OTL writes; others' spellings are known too, and where there is one encoder,
            a single tensor may have any key: diffusers' is the word itself.
        widths: text encoder -> numbers in a vector.
        output: whether vectors that are put in after the text encoder are wanted.

    Raises:
        SettingsError: vectors are missing, of another size, or no numbers.
    """
    wanted = {key.removesuffix(OUT): value for key, value in tensors.items() if key.endswith(OUT) == output}
    vectors = {}
    for encoder, key in keys.items():
        names = [name for name in SPELLINGS.get(key, (key,)) if name in wanted]
        if not names and len(keys) == 1 and len(wanted) == 1:
            names = list(wanted)
        if not names:
            kind = "output vectors" if output else "vectors"
            raise SettingsError(f"no {kind} under {key} for {encoder}; the file holds {described(tensors)}")
        files.require_numbers(f"the vectors for {encoder}", {names[0]: wanted[names[0]]})
        vectors[encoder] = torch.atleast_2d(wanted[names[0]].detach().float().cpu())
        if vectors[encoder].ndim != 2 or vectors[encoder].shape[1] != widths[encoder]:
            raise SettingsError(
                f"{encoder} takes vectors of {widths[encoder]} numbers; the file holds {described(tensors)}: it was "
                "made for another family of models"
            )
    if not all(map(len, vectors.values())):
        raise SettingsError(f"it has no vectors: {described(tensors)}")
    if len({len(tensor) for tensor in vectors.values()}) > 1:
        raise SettingsError(f"its text encoders have different numbers of vectors: {described(tensors)}")
    return vectors


def described(tensors: dict[str, Tensor]) -> str:
    """Keys with shapes, the first of them."""
    return listed([f"{key} {list(tensor.shape)}" for key, tensor in tensors.items()]) or "nothing"


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of an embedding file: .safetensors, or A1111's and diffusers' .pt and .bin.

    Raises:
        SettingsError: it is not there, damaged, holds more than tensors, or unpacks to more than the file.
    """
    if not path.is_file():
        raise SettingsError(f"{path}: there is no such file")
    if path.suffix not in files.PICKLED:
        return files.read(path)[0]
    tensors = flat(files.unpickled(path, nn.ParameterDict), path)  # which the files of the method's authors have
    files.require_room(files.bytes_of(tensors.values()), path)
    return tensors


def flat(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of an unpickled embedding, A1111's `string_to_param` or one tensor for each word."""
    if isinstance(content, dict) and "string_to_param" in content:
        content = content["string_to_param"]
    tensors = (
        {str(key): value for key, value in content.items()} if isinstance(content, dict | nn.ParameterDict) else {}
    )
    if not tensors or not all(map(files.is_plain, tensors.values())):
        raise SettingsError(f"{path}: not an embedding: give a .safetensors, or a .pt of A1111 or diffusers")
    return tensors


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], *, dtype: str) -> None:
    """Write the file, read it back and compare.

    Args:
        dtype: of the tensors in the file: "fp32", "fp16" or "bf16".

    Raises:
        SettingsError: a vector holds NaN or infinity.
        RuntimeError: the file does not hold the vectors.
    """
    with files.whole(path) as aside:
        files.write(aside, {key: tensor.to(DTYPES[dtype]) for key, tensor in tensors.items()}, metadata)
        with_hash(aside)
        difference = compare(tensors, files.read(aside)[0])
        if not difference <= TOLERANCE[dtype]:
            raise RuntimeError(f"{path}: differed from the trained vectors by {difference:.1e} of their size; removed")


def compare(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest relative difference of two files' tensors; infinite where keys or shapes differ, or for NaN."""
    if {key: tensor.shape for key, tensor in a.items()} != {key: tensor.shape for key, tensor in b.items()}:
        return math.inf
    differences = [
        torch.linalg.vector_norm(b[key].double() - a[key].double())
        / torch.linalg.vector_norm(a[key].double()).clamp(min=1e-12)
        for key in a
    ]
    return max((float(each.nan_to_num(nan=math.inf)) for each in differences), default=0.0)


def metadata(
    *, architecture: str, title: str, resolution: Size, prediction: str, placeholder: str, vectors: int
) -> dict[str, str]:
    """The header by which tools know an embedding.

    Args:
        architecture: ModelSpec's id of the model it was trained for.
        resolution: pixels that it was trained at.
        prediction: diffusers' prediction_type.
        placeholder: the word that calls it.
        vectors: for each text encoder.
    """
    fields = {
        "sai_model_spec": SPEC,
        "architecture": f"{architecture}/textual-inversion",
        "implementation": "diffusers",
        "title": title,
        "resolution": f"{resolution.w}x{resolution.h}",  # The specification puts the width first.
        "description": f"Embedding of {vectors} vectors",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "prediction_type": PREDICTIONS.get(prediction, prediction),
        "trigger_phrase": placeholder,
    }
    return {f"modelspec.{key}": value for key, value in fields.items()}
