"""Who else reads what a cell writes: the prediction with the file is that of the live model."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from peft.mapping import get_peft_config
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from otl.config import LoraFormat
from otl.formats.lora import PEFT, kohya_key
from otl.methods.adapter import Adapter
from otl.methods.embedding import Embedding
from otl.methods.finetune import Finetune
from otl.methods.lora import Dora, Lora
from otl.methods.vocabulary import tokenizer, tokenizer_name
from otl.modules.base import DiffusionModule
from otl.testing.cells import EMBEDDING, WORD, Cell
from otl.testing.comparing import close, difference, require
from otl.testing.methods import predicted
from otl.testing.published import published

KOHYA_OF_DIFFUSERS = "lora_unet"  # the prefix by which diffusers knows a file in kohya's names
SHARE = 0.02  # of the change that training made: what rounding may add


class Reader(NamedTuple):
    """One program or formula, and the modules whose files it reads."""

    name: str
    reads: Callable[[DiffusionModule], bool]
    check: Callable[[Cell, DiffusionModule, Path], None]


def plain(cell: Cell, result: Path) -> DiffusionModule:
    """The model without what was trained, but for the new words beside an adapter, which files of their own hold."""
    words = result.with_name("cat.safetensors")
    if words.exists():
        return cell.module(f"method.embeddings.cat.file={words}", method=("method=embedding", EMBEDDING))
    return cell.module(method=("method=finetune",))


def again(cell: Cell, live: DiffusionModule, result: Path) -> DiffusionModule | None:
    """A module that goes on from the result; None: the method is none of OTL's, and knows no file to go on from."""
    words = result.with_name("cat.safetensors")
    beside = [f"method.embeddings.cat.file={words}"] if words.exists() else []
    if isinstance(live.method, Adapter):
        return cell.module(f"method.from_file={result}", *beside)
    if isinstance(live.method, Embedding):
        return cell.module(f"method.embeddings.cat.file={result}")
    if isinstance(live.method, Finetune):
        return cell.module(f"model.checkpoint={result}", *beside)
    return None


def require_same_change(before: Tensor, after: Tensor, found: Tensor, reader: str) -> None:
    """What a reader predicts differs from the plain model's prediction as the live model's does."""
    change = (after - before).abs().max().item()
    require(change > 0, "nothing was learned: the live model predicts as the plain one")
    off = (found - after).abs().max().item()
    require(off <= SHARE * change, f"{reader} is off by {off / change:.1%} of what training changed")


def check_again(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """OTL goes on from the result with the prediction that training ended with."""
    other = again(cell, live, result)
    if other is not None:
        require_same_change(predicted(cell.module()), predicted(live), predicted(other), "going on from the file")


# Adapters


def check_formula(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """The file's tensors, added to the plain weights by their published formulas."""
    module = plain(cell, result)
    before, tensors = predicted(module), load_file(result)
    denoiser = module.part("denoiser")
    layers = {path: layer for path, layer in denoiser.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    own = module.denoiser_names(list(layers))
    name = cell.names.lora if cell.names else lambda path: kohya_key(module.kohya_prefixes[module.denoiser], own[path])
    used: set[str] = set()
    for path, layer in layers.items():
        stem = name(path) + "."
        given = {key.removeprefix(stem): tensor for key, tensor in tensors.items() if key.startswith(stem)}
        if given:
            used |= {stem + end for end in given}
            with torch.no_grad():
                layer.weight.add_(published(given, layer.weight).to(layer.weight))
    rest = sorted(tensors.keys() - used)
    require(not rest, f"{len(rest)} keys of the file belong to no layer, such as {rest[:1]}")
    require_same_change(before, predicted(live), predicted(module), "the published formula")


def in_peft_s_names(live: DiffusionModule, folder: Path) -> Path:
    """The adapter once more, in the names of PEFT and diffusers."""
    folder.mkdir(exist_ok=True)
    style, live.output_options.format = live.output_options.format, LoraFormat.peft
    file = live.export(folder / live.output_options.name)
    live.output_options.format = style
    return file


def check_peft(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """PEFT builds the layers from the file, in a denoiser that it is told nothing else of."""
    file = in_peft_s_names(live, cell.folder / "peft")
    module = plain(cell, result)
    before, denoiser = predicted(module), module.part("denoiser")
    stem = f"{module.denoiser}."
    tensors = {key.removeprefix(stem): tensor for key, tensor in load_file(file).items() if key.startswith(stem)}
    inject_adapter_in_model(peft_settings(file, module.denoiser, tensors, live), denoiser)
    alien = set_peft_model_state_dict(denoiser, tensors).unexpected_keys
    require(not alien, f"PEFT knows nothing of {alien[:1]}")
    require_same_change(before, predicted(live), predicted(module), "PEFT")


def peft_settings(file: Path, part: str, tensors: dict[str, Tensor], live: DiffusionModule) -> PeftConfig:
    """From the header, or for a LoRA, whose strength is one, from the tensors."""
    if not isinstance(live.method, Lora):
        with safe_open(file, "pt") as opened:
            return get_peft_config(json.loads(opened.metadata()[f"peft.{part}"]))
    downs = {key.removesuffix(".lora_A.weight"): len(down) for key, down in tensors.items() if "lora_A" in key}
    (rank,) = set(downs.values())
    paths = "|".join(map(re.escape, downs))
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=paths, use_dora=isinstance(live.method, Dora))


def check_diffusers_adapter(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """The stock pipeline's own loader: of kohya's names where it knows them, else of its own."""
    module = plain(cell, result)
    before = predicted(module)
    known = module.kohya_prefixes[module.denoiser] == KOHYA_OF_DIFFUSERS
    module.pipeline.load_lora_weights(result if known else in_peft_s_names(live, cell.folder / "diffusers"))
    require_same_change(before, predicted(live), predicted(module), "diffusers")


# Whole models


def check_weights(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """The denoiser's own class reads the folder."""
    own = live.part("denoiser")
    require_same_weights(type(own).from_pretrained(result / live.denoiser), own)


def check_diffusers_model(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """The stock pipeline reads the folder."""
    pipeline = type(live.pipeline).from_pretrained(result, **live.pipeline_options)
    require_same_weights(getattr(pipeline, live.denoiser), live.part("denoiser"))


def require_same_weights(read: nn.Module, live: nn.Module) -> None:
    found, expected = read.state_dict(), live.state_dict()
    require(found.keys() == expected.keys(), f"other weights: {sorted(found.keys() ^ expected.keys())[:2]}")
    wrong = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    require(not wrong, f"{len(wrong)} weights are others, such as {wrong[:1]}")


# Embeddings


def embedding_file(live: DiffusionModule, result: Path) -> Path:
    return result if isinstance(live.method, Embedding) else result.with_name("cat.safetensors")


def check_keys(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """The file has each text encoder's vectors under its key, bit for bit."""
    tensors = load_file(embedding_file(live, result))
    keys = list(cell.names.embedding) if cell.names else [live.embedding_keys[name] for name in live.text_encoders]
    require(sorted(tensors) == sorted(keys), f"the embedding's keys are {sorted(tensors)}, looked up are {keys}")
    vectors = live.embeddings.state()["cat"]
    wrong = [key for key, name in zip(keys, live.text_encoders) if not torch.equal(tensors[key], vectors[name])]
    require(not wrong, f"the vectors under {wrong} are not those that were trained")


def check_diffusers_words(cell: Cell, live: DiffusionModule, result: Path) -> None:
    """diffusers reads the new word, and encodes a prompt with it as OTL does."""
    file, module = embedding_file(live, result), cell.module(method=("method=finetune",))
    pipeline, tensors = module.pipeline, load_file(file)
    for name in module.text_encoders:
        own = copy.deepcopy(tokenizer(module, name))  # it is the cell's, and gets the new word
        setattr(pipeline, tokenizer_name(name), own)
        given = tensors[module.embedding_keys[name]] if len(tensors) > 1 else str(file)
        pipeline.load_textual_inversion(given, token=WORD, text_encoder=module.part(name), tokenizer=own)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        found = pipeline.encode_prompt(f"a photo of a {WORD}", **options)[0]
        expected = live.encode_prompt([f"a photo of a {WORD}"])["hidden"]
    require(close(found, expected), f"diffusers encodes the new word otherwise, off by {difference(found, expected)}")


def is_adapter(module: DiffusionModule) -> bool:
    return isinstance(module.method, Adapter)


def loads(module: DiffusionModule, name: str) -> bool:
    """Whether the stock pipeline's class has a loader of that name."""
    return hasattr(module.pipeline_class, name)


def is_model(module: DiffusionModule) -> bool:
    return isinstance(module.method, Finetune)


def has_words(module: DiffusionModule) -> bool:
    return module.embeddings is not None


TEXTS = {
    "formula": "the tensors, under the names that kohya's tools and ComfyUI look up (no program does for Wuerstchen), "
    "added to the plain weights by the formula that was published with their kind, predict as the live adapter",
    "PEFT": "PEFT builds the layers from the file in its own names, and they predict as the live ones",
    "weights": "the denoiser's own class reads the folder, bit for bit",
    "keys": "the vectors, bit for bit, under the keys that such files have",
    "diffusers": "the stock pipeline's own loader gives the prediction, the weights or the conditioning of the live "
    "model",
}
READERS = (
    Reader("formula", is_adapter, check_formula),
    Reader("PEFT", lambda module: is_adapter(module) and module.method.kind in PEFT, check_peft),
    Reader("weights", is_model, check_weights),
    Reader("keys", has_words, check_keys),
    Reader(
        "diffusers",
        lambda module: type(module.method) is Lora and loads(module, "load_lora_weights"),
        check_diffusers_adapter,
    ),
    Reader(
        "diffusers",
        lambda module: is_model(module) and "deprecated" not in module.pipeline_class.__module__,  # Wuerstchen's
        check_diffusers_model,
    ),
    Reader(
        "diffusers", lambda module: has_words(module) and loads(module, "load_textual_inversion"), check_diffusers_words
    ),
)
