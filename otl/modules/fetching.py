"""One network at a time, by its class: for pipelines that diffusers cannot load any more, and for files of one part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from otl.config import SettingsError
from otl.modules.efficientnet import EfficientNetEncoder
from otl.modules.loading import looks_like_path, meta_part, nearest, quiet


def fetch(part_class: Any, source: str, subfolders: tuple[str, ...], *, setting: str, dtype: torch.dtype) -> nn.Module:
    """A network with its weights on the CPU.

    Args:
        part_class: of diffusers or transformers.
        source: hub name or folder.
        subfolders: of the source; the first that is there is taken.
        setting: the one that gave the source.

    Raises:
        SettingsError: it is not there, or holds another network.
    """
    quiet()
    subfolder, local = place(source, subfolders, setting=setting)
    try:
        part, info = part_class.from_pretrained(
            Path(source).expanduser() if local else source,
            subfolder=subfolder,
            dtype=dtype,
            local_files_only=local or cached(source, f"{subfolder}/config.json"),
            output_loading_info=True,
        )
    except Exception as error:
        raise unreachable(setting, source, subfolder, error) from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise SettingsError(
            f"{setting}={source}: {subfolder} is not a whole {part_class.__name__}: {len(wrong)} weights are missing "
            f"or of another shape, such as {wrong[0]}. Choose the model= that it belongs to"
        )
    return part


def fetch_other(part_class: Any, source: str, subfolder: str, *, setting: str) -> Any:
    """A tokenizer or scheduler; the same errors."""
    file = "tokenizer_config.json" if subfolder.startswith("tokenizer") else "scheduler_config.json"
    _, local = place(source, (subfolder,), setting=setting, file=file)
    try:
        return part_class.from_pretrained(
            Path(source).expanduser() if local else source,
            subfolder=subfolder,
            local_files_only=local or cached(source, f"{subfolder}/{file}"),
        )
    except Exception as error:
        raise unreachable(setting, source, subfolder, error) from error


def place(source: str, subfolders: tuple[str, ...], *, setting: str, file: str = "config.json") -> tuple[str, bool]:
    """The subfolder to load from, and whether the source is a folder here.

    Raises:
        SettingsError: a path to nothing, or a folder without any of the subfolders.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if path.is_file() or looks_like_path(source):
            raise SettingsError(f"{setting}={source}: there is no such folder{nearest(path)}. {how(setting)}")
        return subfolders[0], False
    found = [subfolder for subfolder in subfolders if (path / subfolder / file).is_file()]
    if not found:
        raise SettingsError(f"{setting}={source}: the folder has no {subfolders[0]}/{file}. {how(setting)}")
    return found[0], True


def how(setting: str) -> str:
    return f"Give a local one with {setting}=PATH: a folder in diffusers' layout"


def unreachable(setting: str, source: str, subfolder: str, error: Exception) -> SettingsError:
    cause = (str(error).strip().splitlines() or [""])[0][:200]
    return SettingsError(
        f"{setting}={source}: {subfolder} cannot be loaded from there ({type(error).__name__}: {cause}). {how(setting)}"
    )


def cached(source: str, file: str) -> bool:
    """Whether the hub's cache has a file, so that the network need not be asked."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, file), str)


def require_reachable(source: str, subfolders: tuple[str, ...], *, setting: str) -> None:
    """Look whether a network is there, without loading it.

    Raises:
        SettingsError: it is not.
    """
    from huggingface_hub import hf_hub_download

    subfolder, local = place(source, subfolders, setting=setting)
    file = f"{subfolder}/config.json"
    if not local and not cached(source, file):
        try:
            hf_hub_download(source, file)
        except Exception as error:
            raise unreachable(setting, source, subfolder, error) from error


def meta_from(source: str, subfolders: tuple[str, ...], part_class: Any, *, setting: str, otherwise: Path) -> nn.Module:
    """A network on the meta device: of the source's own config where that is a folder here, else of another's.

    Args:
        otherwise: folder of the config that ships with OTL.

    Raises:
        SettingsError: a path to nothing, or another class of network.
    """
    subfolder, local = place(source, subfolders, setting=setting)
    folder = Path(source).expanduser() / subfolder if local else otherwise
    own = json.loads((folder / "config.json").read_text())
    names = own.get("architectures") or [own.get("_class_name", part_class.__name__)]
    if part_class.__name__ not in names:
        raise SettingsError(
            f"{setting}={source}: {subfolder} is a {names[0]}, not a {part_class.__name__}: choose the model= that the "
            "checkpoint belongs to"
        )
    with torch.device("meta"):
        return meta_part(folder, part_class)


# The image encoder


def fetch_encoder(source: str) -> EfficientNetEncoder:
    """The image encoder in fp32 on the CPU.

    Args:
        source: .safetensors file here, `owner/name/file.safetensors` on the hub, or folder or hub name in diffusers'
            layout.

    Raises:
        SettingsError: it is not there, or is another network.
    """
    quiet()
    file = encoder_file(source)
    if file is not None:
        return encoder_of_file(file, source)
    local = Path(source).expanduser().is_dir()
    try:
        encoder, info = EfficientNetEncoder.from_pretrained(
            Path(source).expanduser() if local else source,
            dtype=torch.float32,
            local_files_only=local or cached(source, "config.json"),
            output_loading_info=True,
        )
    except Exception as error:
        raise no_encoder(source, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}") from error
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise no_encoder(source, f"{len(wrong)} weights are missing, too many or of another shape, such as {wrong[0]}")
    return encoder


def encoder_file(source: str) -> Path | None:
    """The file of a source, fetched from the hub if it lies there; None: the source is a folder or hub name.

    Raises:
        SettingsError: it is nowhere.
    """
    from huggingface_hub import hf_hub_download

    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not is_hub_file(source):
        if path.is_dir() or not looks_like_path(source):
            return None
        raise no_encoder(source, f"there is no such file or folder{nearest(path)}")
    owner, name, file = source.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file, local_files_only=cached(f"{owner}/{name}", file)))
    except Exception as error:
        raise no_encoder(source, f"no file here, and the hub did not give it ({type(error).__name__})") from error


def is_hub_file(source: str) -> bool:
    """Whether a source that is no file here can be `owner/name/file.safetensors` on the hub."""
    return not source.startswith((".", "/", "~")) and source.count("/") >= 2 and source.endswith(".safetensors")


def encoder_of_file(file: Path, source: str) -> EfficientNetEncoder:
    try:
        tensors = load_file(file)
    except Exception as error:
        raise no_encoder(source, f"not a whole safetensors file: {error}") from error
    with torch.device("meta"):
        encoder = EfficientNetEncoder(affine="mapper.1.weight" in tensors)
    own = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    given = {name: tensor.shape for name, tensor in tensors.items()}
    if own != given:
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        raise no_encoder(source, f"not the published image encoder: {len(wrong)} weights differ, such as {wrong[0]}")
    encoder.load_state_dict(
        {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}, assign=True
    )
    return encoder


def no_encoder(source: str, why: str) -> SettingsError:
    return SettingsError(
        f"model.effnet={source}: {why}. Pictures are encoded by it: give the file effnet_encoder.safetensors, or a "
        "folder in diffusers' layout"
    )


def meta_encoder(source: str) -> EfficientNetEncoder:
    """The image encoder on the meta device; a folder may hold another size of it.

    Raises:
        SettingsError: a path to nothing.
    """
    path = Path(source).expanduser()
    if not path.exists() and looks_like_path(source) and not is_hub_file(source):
        raise no_encoder(source, f"there is no such file or folder{nearest(path)}")
    config = path / "config.json"
    with torch.device("meta"):
        return EfficientNetEncoder.from_config(json.loads(config.read_text()) if config.is_file() else {}).eval()
