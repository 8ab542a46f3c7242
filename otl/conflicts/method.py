"""What a method's settings ask for that it or the family does not have, as far as their sources say: without torch.

Each check is the function that the method itself calls when it is made or attached. What a source does not say, as a
plugin's may not, is told then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from otl.config import CheckpointFormat, ConceptType, LoraFormat, Output, Problem, SettingsError
from otl.conflicts.data import prompts_read
from otl.declared import declared, descends
from otl.methods import forms, parts, patterns, specs, templates
from otl.signatures import signature, unclear
from otl.sources import Unclear
from otl.wording import show

ADAPTER = "otl.methods.adapter.Adapter"
FINETUNE = "otl.methods.finetune.Finetune"
INPAINT = "otl.methods.inpaint.Inpaint"


def of_method(settings: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with the method's settings beside those of model and output, where each has its right type."""
    method, model = (settings.get(group) or {} for group in ("method", "model"))
    if not all(isinstance(group, dict) and "_target_" in group for group in (method, model)) or unclear(method):
        return
    for check in (check_parts, check_layers, check_embeddings, check_files, check_templates, check_priors):
        try:
            check(method, model["_target_"], settings)
        except Unclear:
            continue  # told when the method is made
        except SettingsError as error:
            key, _, message = str(error).partition(": ")
            yield Problem(key, message)


def check_parts(method: dict[str, Any], family: str, settings: dict[str, Any]) -> None:
    """The parts that train, and the preset of their layers."""
    chosen = parts.chosen_parts(given(method), accepted=declared(method["_target_"], "part_settings"))
    presets = declared(family, "lora_targets")
    for name in parts.by_pipeline_name(chosen, names_of(family), trainable=trainable(method["_target_"], family)):
        if isinstance(method.get("targets"), str) and method["targets"] != "file":
            patterns.preset(method["targets"], presets.get(name, {}))


def given(method: dict[str, Any]) -> dict[str, Any]:
    return {"denoiser": {}} if method.get("parts") is None else method["parts"]


def names_of(family: str) -> Callable[[str], str]:
    denoiser, part_names = declared(family, "denoiser"), declared(family, "part_names")
    return partial(parts.pipeline_name, family=family.rpartition(".")[2], denoiser=denoiser, part_names=part_names)


def trainable(kind: str, family: str) -> list[str]:
    """The parts that a method can train."""
    if descends(kind, ADAPTER):
        return list(declared(family, "lora_targets"))
    if descends(kind, FINETUNE):
        return [name for name in declared(family, "part_names") if name != declared(family, "image_encoder")]
    raise Unclear(kind)


def check_layers(method: dict[str, Any], family: str, settings: dict[str, Any]) -> None:
    """Patterns, what they are given, and the file whose layers go on."""
    sizes = next((name for name in ("ranks", "block_sizes") if name in method), None)
    for setting in ("targets", "exclude", *([sizes] if sizes else [])):
        for pattern in patterns.as_list(method.get(setting)):
            patterns.compiled(str(pattern), setting)
    if sizes:
        parts.check_sizes(method[sizes] or {}, sizes)
    if "from_file" in signature(method["_target_"]).parameters:
        patterns.starting_file(method.get("from_file"), method.get("targets") or [])


def check_embeddings(method: dict[str, Any], family: str, settings: dict[str, Any]) -> None:
    """The new words, and what is only for them."""
    accepted = signature(method["_target_"]).parameters
    if "embeddings" not in accepted:
        return
    words = specs.parse(method.get("embeddings"))
    if templates.chosen(method.get("templates")):
        specs.require(words, f"method.templates={show(method['templates'])}")
    if method.get("bundle_embeddings"):
        specs.require(words, "method.bundle_embeddings=true")
    if accepted["embeddings"].required:
        specs.require(words, "method.embeddings")
    specs.refuse_name(words, (settings.get("output") or {}).get("name", Output.name))
    for each in words.values():
        specs.require_file(each)


def check_files(method: dict[str, Any], family: str, settings: dict[str, Any]) -> None:
    """Whether there is such a form of the model to train, and of the file to write."""
    kind, name, output = method["_target_"], family.rpartition(".")[2], settings.get("output") or {}
    if descends(kind, FINETUNE) and output.get("checkpoint_format") is CheckpointFormat.single_file:
        forms.require_single_file(name, written=declared(family, "writes_file"))
    if descends(kind, ADAPTER) and output.get("format") is LoraFormat.peft:
        forms.require_peft(written=declared(kind, "writes_peft"))
    if descends(kind, INPAINT) and declared(family, "inpaint_pipeline_class") is None:
        forms.require_inpainting(name, there=False)


def check_templates(method: dict[str, Any], family: str, settings: dict[str, Any]) -> None:
    """Whether the sentences are read, where there are any for the images of a concept."""
    if not method.get("templates") or "embeddings" not in signature(method["_target_"]).parameters:
        return
    sentences = templates.chosen(method["templates"])
    placeholders = {name: each.placeholder for name, each in specs.parse(method.get("embeddings")).items()}
    for key, read in prompts_read(settings.get("data") or {}).items() if placeholders else ():
        concept = "data" if key == "data.captions" else key.split(".")[2]
        if templates.captions(sentences, placeholders, concept):
            templates.require_source(key, read=read)


def check_priors(method: dict[str, Any], family: str, settings: dict[str, Any]) -> None:
    """Whether the frozen model can be asked, where a concept's target is what it predicts."""
    kind = method["_target_"]
    if not kind.startswith("otl."):
        raise Unclear(kind)
    for name, concept in ((settings.get("data") or {}).get("concepts") or {}).items():
        if concept.get("type") == ConceptType.prior and concept.get("enabled", True):
            forms.require_adapters(name, kind.rpartition(".")[2], there=descends(kind, ADAPTER))
