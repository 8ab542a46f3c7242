"""Where weights come from: the hub, a diffusers folder, a single file, or nowhere (shapes only)."""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from otl import agreement
from otl.config import SettingsError, assets_dir
from otl.datamodules.files import content_hash, stamp
from otl.datamodules.index import Index
from otl.formats.original import config_folder
from otl.formats.stored import Stored, in_folder, of_network
from otl.modules.folders import HOW, check_index, read_json, said
from otl.urls import looks_like_path

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"  # in single files


def load(
    family: DiffusionModule, checkpoint: str, *, dtypes: dict[str, torch.dtype], without: Sequence[str] = ()
) -> Any:
    """A diffusers pipeline with its weights on the CPU.

    Args:
        checkpoint: hub name, diffusers folder or .safetensors file.
        dtypes: part -> dtype of its weights, with a "default".
        without: parts that are left out; a single file is read whole all the same.

    Raises:
        SettingsError: nothing is there, or it is not a checkpoint of this family.
    """
    path = Path(checkpoint).expanduser()
    quiet()
    if path.is_file():
        return load_file(family, path, dtypes=dtypes)
    if path.is_dir():
        return load_folder(family, path, dtypes=dtypes, without=without)
    if looks_like_path(checkpoint):
        raise SettingsError(f"model.checkpoint={checkpoint}: there is no such file or folder{nearest(path)}. {HOW}")
    return load_hub(family, checkpoint, dtypes=dtypes, without=without)


def quiet() -> None:
    """No progress bars and no advice from the libraries that load: what matters is in OTL's own log."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def nearest(path: Path) -> str:
    """A hint at a neighbour with nearly that name, or nothing."""
    if not path.parent.is_dir():
        return f", nor the folder {path.parent}"
    close = difflib.get_close_matches(path.name, [child.name for child in path.parent.iterdir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def load_folder(
    family: DiffusionModule, folder: Path, *, dtypes: dict[str, torch.dtype], without: Sequence[str] = ()
) -> Any:
    check_index(family, folder)
    options = family.pipeline_options | dict.fromkeys(without)
    try:
        return family.pipeline_class.from_pretrained(folder, dtype=dtypes, local_files_only=True, **options)
    except Exception as error:  # each library has errors of its own
        raise SettingsError(
            f"model.checkpoint={folder}: cannot be loaded ({said(error)}): give a whole one of the family in model="
        ) from error


def identity(family: DiffusionModule, known: Index | None = None) -> dict[str, str]:
    """What the checkpoint holds, without loading it: file -> hash of its bytes, of those that are loaded.

    Of one from the hub the commit that lies in its cache; empty where it is not there yet.

    Args:
        known: hashes of earlier runs, of files that have not changed since; None: all are read.
    """
    path = Path(family.checkpoint).expanduser()
    if path.is_dir():
        files = [file for folder in sorted(path.iterdir()) if folder.is_dir() for file in _loaded(folder, family)]
    elif path.is_file():
        files = [path]
    else:
        from huggingface_hub import try_to_load_from_cache

        kept = (
            None
            if looks_like_path(family.checkpoint)
            else try_to_load_from_cache(family.checkpoint, "model_index.json")
        )
        return {"commit": Path(kept).parent.name} if isinstance(kept, str) else {}
    base = path if path.is_dir() else path.parent
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda file: _hash(file, known), files)
        hashes = dict(zip((file.relative_to(base).as_posix() for file in files), found))
    if known is not None:
        known.flush()
    return hashes


def _hash(file: Path, known: Index | None) -> str:
    """Of the bytes; a gigabyte takes a processor more than a second."""
    if known is None:
        return content_hash(file)
    name, before = str(file.absolute()), stamp(file)
    found = known.get(name, before)
    if found is None:
        known.put(name, before, found := content_hash(file))
    return found


def _loaded(folder: Path, family: DiffusionModule) -> list[Path]:
    """The files of one part of a checkpoint that count: no variants such as fp16, and one format of weights."""
    if folder.name not in family.part_names and not folder.name.startswith(("scheduler", "tokenizer")):
        return []
    files = sorted(file for file in folder.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix == ".safetensors" and "." not in file.stem]
    weights = weights or [file for file in files if file.suffix == ".bin" and "." not in file.stem]
    return weights + [file for file in files if file.suffix in {".json", ".txt", ".model"}]


def load_part(family: DiffusionModule, name: str, *, dtype: torch.dtype) -> nn.Module:
    """One part of the checkpoint, with its weights on the CPU.

    Args:
        name: as the pipeline has it.
        dtype: of its weights.

    Raises:
        SettingsError: the checkpoint is not there any more.
    """
    path = Path(family.checkpoint).expanduser()
    if not path.is_dir() and looks_like_path(family.checkpoint):
        return getattr(family.load_pipeline(), name)  # a single file is read whole
    part_class = family.part_classes()[name]
    quiet()
    try:
        return part_class.from_pretrained(path if path.is_dir() else family.checkpoint, subfolder=name, dtype=dtype)
    except OSError as error:
        cause = str(error).strip().splitlines()[0][:200]
        raise SettingsError(
            f"model.checkpoint={family.checkpoint}: {name} was loaded from there at the start and cannot be loaded "
            f"again ({cause}): put it back"
        ) from error


def stored(network: nn.Module, source: str, subfolder: str) -> Stored | None:
    """The weights of a network that lie on this disk, by its own names.

    Args:
        network: of which names and shapes are read.
        source: hub name or folder.
        subfolder: of the source.

    Returns:
        None where they lie elsewhere or in another form, so that only `load_part` can read them.
    """
    folder = Path(source).expanduser() / subfolder
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        kept = None if looks_like_path(source) else try_to_load_from_cache(source, f"{subfolder}/config.json")
        if not isinstance(kept, str):
            return None
        folder = Path(kept).parent
    return of_network(network, in_folder(folder))


def load_file(family: DiffusionModule, file: Path, *, dtypes: dict[str, torch.dtype]) -> Any:
    if file.suffix != ".safetensors":
        raise SettingsError(f"model.checkpoint={file}: only .safetensors files are read (others can run code). {HOW}")
    check_keys(family, file)
    if family.inpaint_pipeline_class is not None:
        check_channels(family, file)
    with tempfile.TemporaryDirectory() as folder:
        config = config_folder(family.config_name, Path(folder))
        pipeline = family.pipeline_class.from_single_file(
            str(file), config=str(config), dtype=torch.float32, local_files_only=True, **family.pipeline_options
        )
    for name in family.part_names:
        getattr(pipeline, name).to(dtypes.get(name, dtypes["default"]))
    return pipeline


def check_keys(family: DiffusionModule, file: Path) -> None:
    """Refuse a file that lacks the keys by which this family's original checkpoints are known."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            keys = set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise SettingsError(f"model.checkpoint={file}: not a whole safetensors file ({error})") from error
    lacking = [key for key in family.file_keys if key not in keys]
    if lacking:
        raise SettingsError(
            f"model.checkpoint={file}: not a single-file checkpoint of {type(family).__name__} (no {lacking[0]}). "
            "Choose the model= that the checkpoint belongs to"
        )
    if foreign := [key for key in family.foreign_keys if key in keys]:
        raise SettingsError(
            f"model.checkpoint={file}: a single-file checkpoint of another family than {type(family).__name__} (it has "
            f"{foreign[0]}). Choose the model= that the checkpoint belongs to"
        )


def check_channels(family: DiffusionModule, file: Path) -> None:
    """Refuse an inpainting checkpoint where the settings describe another one, and the other way round."""
    from safetensors import safe_open

    config = assets_dir() / "configs" / family.config_name / family.denoiser / "config.json"
    expected = json.loads(config.read_text())["in_channels"]
    with safe_open(file, "pt") as tensors:
        there = FIRST_CONVOLUTION in set(tensors.keys())
        found = tensors.get_slice(FIRST_CONVOLUTION).get_shape()[1] if there else expected
    if found != expected:
        kind = "an inpainting model" if found > expected else "no inpainting model"
        raise SettingsError(
            f"model.checkpoint={file}: its denoiser has {found} input channels, not {expected}: it is {kind}. Choose "
            "the model= that it belongs to (those of inpainting models end with _inpaint)"
        )


def load_hub(family: DiffusionModule, name: str, *, dtypes: dict[str, torch.dtype], without: Sequence[str] = ()) -> Any:
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, "model_index.json"), str)
    try:
        return family.pipeline_class.from_pretrained(
            name, dtype=dtypes, local_files_only=cached, **family.pipeline_options | dict.fromkeys(without)
        )
    except Exception as error:
        raise SettingsError(
            f"model.checkpoint={name}: not a folder or file here, "
            f"{'incomplete' if cached else 'not'} in the hub's cache ({constants.HF_HUB_CACHE}), "
            f"and the hub did not give it ({said(error)}). {HOW}"
        ) from error


def skeleton(family: DiffusionModule, checkpoint: str) -> SimpleNamespace:
    """The parts of a pipeline on the meta device: shapes without weights, from the checkpoint's own configs where it is
    a folder, else from those that ship with OTL."""
    folder = Path(checkpoint).expanduser()
    if not (folder / "model_index.json").is_file():
        folder = assets_dir() / "configs" / family.config_name
    else:
        check_index(family, folder)
    with torch.device("meta"):
        parts = {name: meta_part(folder / name, part_class) for name, part_class in family.part_classes().items()}
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    agreement.require_size(scheduler, where=str(folder / "scheduler" / "scheduler_config.json"))
    tokenizers = {path.parent.name: ShapeTokenizer(path) for path in folder.glob("tokenizer*/tokenizer_config.json")}
    return SimpleNamespace(**parts, **tokenizers, scheduler=SimpleNamespace(config=scheduler))


class ShapeTokenizer:
    """Token ids of the right shape on the meta device: what a skeleton needs of a tokenizer."""

    pad_token_id = eos_token_id = 0

    def __init__(self, config: Path) -> None:
        length = read_json(config).get("model_max_length")
        if not isinstance(length, int):
            raise SettingsError(f"{config}: model_max_length is {length!r}, not a number of tokens")
        self.model_max_length = length

    def __call__(self, captions: list[str], *, max_length: int | None = None, **_: Any) -> SimpleNamespace:
        ids = torch.zeros(len(captions), max_length or self.model_max_length, dtype=torch.long, device="meta")
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def meta_part(folder: Path, part_class: Any) -> nn.Module:
    """A network by its config.json, in the dtype and on the device that are the default.

    Raises:
        SettingsError: there is none, or it describes no such network.
    """
    config = read_json(folder / "config.json")
    agreement.require_size(config, where=str(folder / "config.json"))
    try:
        if hasattr(part_class, "config_class"):  # transformers
            return part_class(part_class.config_class(**config)).eval()
        return part_class.from_config(config).eval()
    except Exception as error:  # whatever a number of another kind or size leads to
        raise SettingsError(
            f"{folder / 'config.json'} describes no {part_class.__name__} ({said(error)}): give a whole checkpoint"
        ) from error
