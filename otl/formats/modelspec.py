"""The header fields by which other tools know a file: ModelSpec 1.0.1 and the least of kohya's."""

from __future__ import annotations

import hashlib
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

from otl.formats.files import whole
from otl.formats.lora import rank_of, title_of
from otl.types import AdapterState, OftLayer, Size

SPEC = "1.0.1"  # https://github.com/Stability-AI/ModelSpec
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}


def uniform(values: set[float]) -> str:
    """The one value of all layers, or kohya's word for several."""
    return f"{values.pop():g}" if len(values) == 1 else "Dynamic"


def kohya_metadata(
    state: AdapterState,
    *,
    base_model_version: str,
    name: str,
    network: str = "networks.lora",
    arguments: dict[str, str] | None = None,
) -> dict[str, str]:
    """What A1111, Forge and kohya's own tools look at.

    Args:
        base_model_version: kohya's id: "sd_v1", "sdxl_base_v1-0", ...
        name: of the file, without suffix.
        network: the Python module that trains such files in kohya's scripts.
        arguments: of that module, as words.
    """
    layers = [layer for part in state.values() for layer in part.values()]
    return {
        "ss_v2": str(base_model_version.startswith("sd_v2")),
        "ss_base_model_version": base_model_version,
        "ss_network_module": network,
        "ss_network_dim": uniform(
            {layer.blocks.shape[1] if isinstance(layer, OftLayer) else rank_of(layer) or 0 for layer in layers}
        ),
        "ss_network_alpha": uniform({0.0 if isinstance(layer, OftLayer) else layer.alpha for layer in layers}),
        "ss_network_args": json.dumps(arguments or {}),
        "ss_output_name": name,
    }


def described(state: AdapterState, kohya: dict[str, str]) -> str:
    """One line on what an adapter is."""
    layer = next(layer for part in state.values() for layer in part.values())
    title = title_of(layer)
    if isinstance(layer, OftLayer):
        return f"{title}, blocks of {kohya['ss_network_dim']}"
    return f"{title}, rank {kohya['ss_network_dim']}, alpha {kohya['ss_network_alpha']}"


def lora_metadata(
    state: AdapterState,
    *,
    architecture: str,
    base_model_version: str,
    title: str,
    name: str,
    resolution: Size,
    implementation: str = "diffusers",
    prediction: str = "epsilon",
    network: str = "networks.lora",
    arguments: dict[str, str] | None = None,
    description: str | None = None,
    author: str | None = None,
    trigger: str | None = None,
    date: datetime | None = None,
) -> dict[str, str]:
    """The header of a LoRA file; `with_hash` adds the hashes once it is written.

    Args:
        architecture: ModelSpec's id of the model it adapts: "stable-diffusion-v1", "stable-diffusion-xl-v1-base", ...
        base_model_version: kohya's id of the same: "sd_v1", "sdxl_base_v1-0", ...
        name: of the file, without suffix.
        resolution: pixels that it was trained at.
        implementation: the code base whose names the keys follow: "diffusers", or the URL of sgm for its spelling.
        prediction: diffusers' prediction_type.
        network: kohya's name of the Python module that trains such files.
        arguments: of that module, as words.
        description: None: one line made of the rank.
        trigger: words that call the concept.
        date: None: now.
    """
    kohya = kohya_metadata(
        state, base_model_version=base_model_version, name=name, network=network, arguments=arguments
    )
    fields = {
        "sai_model_spec": SPEC,
        "architecture": f"{architecture}/lora",
        "implementation": implementation,
        "title": title,
        "resolution": f"{resolution.w}x{resolution.h}",  # The specification puts the width first.
        "description": description or described(state, kohya),
        "author": author,
        "date": (date or datetime.now(UTC)).isoformat(timespec="seconds"),
        "prediction_type": PREDICTIONS.get(prediction, prediction),
        "trigger_phrase": trigger,
    }
    return {f"modelspec.{key}": value for key, value in fields.items() if value is not None} | kohya


def checkpoint_metadata(
    *, architecture: str, title: str, resolution: Size, implementation: str, prediction: str
) -> dict[str, str]:
    """The header of a whole model in one file; the arguments are those of `lora_metadata`."""
    fields = {
        "sai_model_spec": SPEC,
        "architecture": architecture,
        "implementation": implementation,
        "title": title,
        "resolution": f"{resolution.w}x{resolution.h}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "prediction_type": PREDICTIONS.get(prediction, prediction),
    }
    return {"format": "pt"} | {f"modelspec.{key}": value for key, value in fields.items()}


def with_hash(path: Path) -> str:
    """Write the SHA-256 of a safetensors file's tensors into its header, and return it in hexadecimal."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors_start = file.tell()
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        hashes = {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
        header["__metadata__"] = header.get("__metadata__", {}) | hashes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # The tensors stay aligned.
        file.seek(tensors_start)
        with whole(path) as aside, aside.open("wb") as out:
            out.write(len(encoded).to_bytes(8, "little") + encoded)
            shutil.copyfileobj(file, out)
    return digest
