"""Weights that stay on the disk: safetensors files read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from otl.config import SettingsError
from otl.formats.files import bytes_of, destination, listed, whole
from otl.formats.lora import portable_text_path
from otl.formats.objects import parsed

KINDS = {  # torch's names of what networks hold -> safetensors'
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
STEMS = ("model", "diffusion_pytorch_model")  # of transformers' and of diffusers' weights


class Stored(Mapping[str, Tensor]):
    """Tensors each of which is read when it is asked for, and not kept.

    Args:
        reads: name -> what reads it.
    """

    def __init__(self, reads: Mapping[str, Callable[[], Tensor]]) -> None:
        self.reads = reads

    def __getitem__(self, name: str) -> Tensor:
        return self.reads[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.reads)

    def __len__(self) -> int:
        return len(self.reads)


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Stored:
    """Some of the tensors under other names.

    Args:
        names: new -> old.
    """
    return Stored({new: partial(tensors.__getitem__, old) for new, old in names.items()})


def together(*several: Mapping[str, Tensor]) -> Stored:
    """All in one; of one name the last."""
    return Stored({name: partial(each.__getitem__, name) for each in several for name in each})


# Reading


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Raises SettingsError: not a whole safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SettingsError(f"{path}: not a whole safetensors file ({error})") from error


def read_one(path: Path, name: str) -> Tensor:
    """A tensor that lies in the file until it is looked at; with it goes what was looked at."""
    with opened(path) as file:
        return file.get_tensor(name)


def in_file(path: Path) -> Stored:
    """All tensors of a safetensors file."""
    with opened(path) as file:
        return Stored({name: partial(read_one, path, name) for name in file.keys()})  # noqa: SIM118


def in_folder(folder: Path) -> Stored:
    """Those of a network's folder, in one file or in several; none where there is no safetensors file."""
    for stem in STEMS:
        if (file := folder / f"{stem}.safetensors").is_file():
            return in_file(file)
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            return Stored({name: partial(read_one, folder / file, name) for name, file in shards(index).items()})
    return Stored({})


def shards(index: Path) -> dict[str, str]:
    """Name of a tensor -> the file beside the index that has it.

    Raises:
        SettingsError: it is no such index, or names a file elsewhere.
    """
    try:
        places = parsed(index.read_bytes(), str(index))["weight_map"]
        strange = [file for file in places.values() if Path(file).name != file or file == ".."]
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingsError(f"{index}: no index of weights in several files ({error!r})") from error
    if strange:
        raise SettingsError(f"{index}: names weights in {strange[0]}, and they have to lie beside it")
    return places


def of_network(network: nn.Module, found: Mapping[str, Tensor]) -> Stored | None:
    """The weights of a network by its own names, tied ones under each of theirs.

    Args:
        network: of which names and shapes are read; it may have no weights.
        found: of a checkpoint, in today's names or in those of transformers 4.

    Returns:
        None where one of them is not among them: only its library knows the names then.
    """
    tied = network.all_tied_weights_keys if isinstance(network, PreTrainedModel) else {}
    twins = tied | {other: name for name, other in tied.items()}
    names: dict[str, str] = {}
    for name, tensor in network.state_dict().items():
        spelled = [way for one in (name, twins.get(name, name)) for way in spellings(one) if way in found]
        if not spelled or found[spelled[0]].shape != tensor.shape:
            return None
        names[name] = spelled[0]
    return renamed(found, names)


def spellings(name: str) -> tuple[str, str, str]:
    """A weight's names in transformers 5 and 4, whichever is given."""
    return name, portable_text_path(name), name.removeprefix("text_model.")


# Writing


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], *, dtype: torch.dtype) -> Path:
    """Write a safetensors file one tensor at a time, read each back and compare, and only then put it in place.

    Args:
        tensors: asked for three times each: for the header, to be written, and to be compared.
        dtype: of those that are not whole numbers.

    Raises:
        SettingsError: a weight is NaN or infinite in that dtype.
        RuntimeError: what is read back is not what was written.
        DiskError: it cannot be written, or the disk has no room for it.
    """
    shapes = {name: cast_meta(tensors[name], dtype) for name in tensors}
    with whole(path, needs=bytes_of(shapes.values())) as aside:
        order = sorted(shapes, key=lambda name: (-shapes[name].itemsize, name))  # so that each is aligned
        broken = []
        with aside.open("wb") as file:
            file.write(header({name: shapes[name] for name in order}, metadata))
            for name in order:
                tensor = cast(tensors[name], dtype)
                broken += [] if finite(tensor) else [name]
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        if broken:
            raise SettingsError(
                f"{destination(path)} was not written: {listed(broken)} would hold NaN or infinity. "
                "If output.dtype=fp16, bf16 and fp32 reach further"
            )
        compare(aside, tensors, dtype=dtype)
    return path


def compare(path: Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype) -> None:
    """Raises RuntimeError: a file does not hold these tensors, cast to a dtype, bit for bit."""
    written = in_file(path)
    if written.keys() != tensors.keys() or any(
        not torch.equal(written[name], cast(tensors[name], dtype)) for name in tensors
    ):
        raise RuntimeError(
            f"{destination(path)}: what was read back is not what was written; is the disk full or failing?"
        )


def finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; by the extremes, which takes a tenth of asking each."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.aminmax()  # NaN if any is
    return bool(low.isfinite() & high.isfinite())


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is written: on the CPU, whole numbers as they are."""
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()


def cast_meta(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Its shape and the dtype that `cast` gives it, without its values."""
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=kind, device="meta")


def header(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """What a safetensors file of these tensors, in their order, begins with: its length, then JSON.
    https://huggingface.co/docs/safetensors/index#format"""
    fields: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.itemsize
        fields[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(fields, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded
