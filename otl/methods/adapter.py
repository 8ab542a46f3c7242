"""What all adapters share: which layers, how strong, where they start, and the file that comes out."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from peft import PeftConfig, inject_adapter_in_model
from torch import nn

from otl import rng
from otl.config import LoraFormat, SettingsError
from otl.formats import lora as lora_file
from otl.methods import exporting, specs
from otl.methods.continuing import continued
from otl.methods.embeddings import Embeddings
from otl.methods.injected import ADAPTER, adapted, live_state, own_parameters
from otl.methods.parts import PartOptions, by_pipeline_name, check_sizes, chosen_parts
from otl.methods.patterns import as_list, starting_file
from otl.methods.targets import by_pattern, excluding, layers, matching
from otl.types import AdapterLayer, AdapterState, LoraLayer, ParamGroup, Problem
from otl.wording import counted

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)


class Strength(NamedTuple):
    """Of one layer: alpha / rank."""

    rank: int
    alpha: float


class Adapter:
    """Small trained matrices beside frozen layers. A kind says the rest: the class attributes and five methods.

    Args:
        rank: inner dimension.
        alpha: numerator of the strength.
        dropout: share that is zeroed in training, 0..1; of what, the kind says.
        targets: a preset of the family (attn-mlp, attn-only, full), patterns on layer names, or "file" for the layers
            of `from_file`.
        exclude: patterns on the names of layers that get none all the same.
        ranks: pattern on layer names -> rank; the first that matches counts, and alpha / rank stays what it was.
        parts: part -> {"lr": learning rate or None for the optimizer's, "rank", "alpha": its own, "stop_after": when it
            stops training: steps, a share of the run below 1, or epochs}; None or absent: no adapter there.
        from_file: an adapter file to go on from, whose layers keep its ranks and alphas.
        embeddings: new words that train beside it, name -> the fields of `otl.methods.specs.Spec`.
        templates: captions of images that have none: "object", "style", or sentences with {} for the placeholder.
        bundle_embeddings: whether their vectors are written into the adapter's file, or each into one of its own.
    """

    whole_parts: tuple[str, ...] = ()
    output_settings: tuple[str, ...] = ("format", "trigger")
    kind: ClassVar[type[AdapterLayer]]  # of layer, in files
    continues: ClassVar[tuple[str, ...]]  # the kinds of files it can go on from
    part_settings: ClassVar[tuple[str, ...]] = ("lr", "rank", "alpha", "stop_after")
    size_setting: ClassVar[str] = "ranks"  # the setting behind `ranks`, for errors
    writes_peft: ClassVar[bool] = True  # whether PEFT's format has it

    def __init__(
        self,
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: str | list[str],
        exclude: str | list[str] | None,
        ranks: dict[str, int] | None,
        parts: dict[str, Any] | None,
        from_file: str | None,
        embeddings: dict[str, Any] | None,
        templates: str | list[str] | None,
        bundle_embeddings: bool,
    ) -> None:
        if rank < 1:
            raise SettingsError(f"method.{self.size_setting.removesuffix('s')}={rank}: must be at least 1")
        if alpha <= 0:
            raise SettingsError(f"method.alpha={alpha}: must be above 0")
        if not 0 <= dropout < 1:
            raise SettingsError(f"method.dropout={dropout}: must be in 0..1, 1 excluded")
        check_sizes(ranks or {}, self.size_setting)
        self.rank, self.alpha, self.dropout, self.targets = rank, alpha, dropout, targets
        self.exclude = as_list(exclude)
        self.ranks = ranks or {}
        self.parts = chosen_parts(parts if parts is not None else {"denoiser": {}}, accepted=self.part_settings)
        self.from_file = starting_file(from_file, targets)
        self.embeddings, self.bundle_embeddings = Embeddings(embeddings, templates), bundle_embeddings
        if bundle_embeddings:
            specs.require(self.embeddings.specs, "method.bundle_embeddings=true")

    def captions(self, concept: str) -> list[str]:
        """Of an image of `concept` that has none of its own: the templates around an embedding's placeholder."""
        return self.embeddings.captions(concept)

    # What a kind says

    def config(self, target: str, strength: Strength, ranks: dict[str, int], alphas: dict[str, float]) -> PeftConfig:
        """PEFT's settings: the pattern of the targeted layers, and patterns of those that differ from `strength`."""
        raise NotImplementedError

    def begin(self, layer: Any) -> None:
        """Put a new layer of PEFT's, in fp32, where the training starts."""

    def fill(self, layer: Any, given: Any) -> None:
        """Give a layer of PEFT's the weights of one from a file, of the same rank and alpha."""
        raise NotImplementedError

    def network(self, state: AdapterState) -> tuple[str, dict[str, str]]:
        """kohya's names for what made the file: the Python module of the network and its arguments."""
        raise NotImplementedError

    def width(self, layer: Any) -> int | None:
        """The largest rank that gives a layer of PEFT's more freedom; above it there are only more numbers.

        None: the layer has no rank.
        """
        raise NotImplementedError

    # Attaching

    def attach(self, module: DiffusionModule) -> list[ParamGroup]:
        """One group of fp32 parameters for each part, and those of the embeddings."""
        options = self.options_by_part(module)
        given = continued(module, self.from_file, self.continues) if self.from_file is not None else {}
        chosen = self.chosen(module, options, given)
        sizes = by_pattern(chosen, self.ranks, setting=self.size_setting)
        groups = []
        for name, settings in options.items():
            strengths = {
                path: self.strength(settings, sizes[name].get(path), given.get(name, {}).get(path))
                for path in chosen[name]
            }
            part = module.part(name)
            trained = {id(parameter) for parameter in part.parameters() if parameter.requires_grad}
            self.inject(part, strengths, seed=rng.key(module.seed, "adapter", name))
            found = {path: layer for path, layer in adapted(part).items() if path in strengths}
            for path, layer in given.get(name, {}).items():
                self.fill(found[path], layer)
            parameters = [parameter for layer in found.values() for parameter in own_parameters(layer)]
            trained |= {id(parameter) for parameter in parameters}
            for parameter in part.parameters():  # PEFT has frozen what others train
                parameter.requires_grad_(id(parameter) in trained)
            groups.append(ParamGroup(name, parameters, settings.lr, settings.stop_after))
        return groups + self.embeddings.attach(module)

    def options_by_part(self, module: DiffusionModule) -> dict[str, PartOptions]:
        """The pipeline's name of each part -> its options.

        Raises:
            SettingsError: a part takes no adapter, or is named twice.
        """
        return by_pipeline_name(self.parts, module.part_name, trainable=module.lora_targets)

    def chosen(
        self, module: DiffusionModule, options: dict[str, PartOptions], given: AdapterState
    ) -> dict[str, list[str]]:
        """part -> paths of the layers that get an adapter.

        Raises:
            SettingsError: a pattern finds nothing, or the file adapts a layer that is left out.
        """
        if alien := [part for part in given if part not in options]:
            raise SettingsError(
                f"method.from_file={self.from_file} also adapts {alien[0]}: add method.parts.{alien[0]}={{}}, or "
                f"method.parts.{alien[0]}={{lr: 0}} to keep it as it is"
            )
        names = {part: layers(module.part(part)) for part in options}
        if self.targets == "file":
            names = {part: [name for name in names[part] if name in given.get(part, {})] for part in options}
            if empty := [part for part, found in names.items() if not found]:
                raise SettingsError(
                    f"method.targets=file, but method.from_file={self.from_file} has nothing for {empty[0]}: "
                    f"set method.parts.{empty[0]}=null, or other targets"
                )
        else:
            names = matching(names, self.targets, module.lora_targets)
        names = excluding(names, self.exclude)
        left_out = [f"{part}.{path}" for part in given for path in given[part] if path not in set(names[part])]
        if left_out:
            raise SettingsError(
                f"method.targets={self.targets} leaves out {len(left_out)} layers that method.from_file="
                f"{self.from_file} adapts: {lora_file.listed(left_out)}. Set method.targets=file for exactly its layers"
            )
        if given:
            known = sum(len(of_part) for of_part in given.values())
            new = sum(map(len, names.values())) - known
            log.info(
                f"{known} layers go on from {self.from_file}, with its ranks and alphas"
                + (f"; {new} others start anew, with method.rank={self.rank}" if new else "")
            )
        return names

    def strength(self, options: PartOptions, rank: int | None, given: Any) -> Strength:
        """Of one layer: as the file has it, else by its pattern, its part or the method."""
        of_part = options.rank or self.rank
        alpha = options.alpha if options.alpha is not None else self.alpha * of_part / self.rank
        if given is not None:
            return Strength(lora_file.rank_of(given) or of_part, given.alpha)
        return Strength(of_part, alpha) if rank is None else Strength(rank, alpha * rank / of_part)

    def inject(self, part: nn.Module, strengths: dict[str, Strength], *, seed: int) -> None:
        """Adapters on the named layers, their start a function of the seed."""
        usual = Counter(strengths.values()).most_common(1)[0][0]
        ranks = {path: strength.rank for path, strength in strengths.items() if strength.rank != usual.rank}
        alphas = {path: strength.alpha for path, strength in strengths.items() if strength.alpha != usual.alpha}
        config = self.config(one_of(strengths), usual, patterns(ranks), patterns(alphas))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, part, adapter_name=ADAPTER)
            for path, layer in adapted(part).items():
                if path in strengths:
                    for parameter in own_parameters(layer):
                        parameter.data = parameter.data.float()  # beside frozen bf16: too coarse to train in
                    self.begin(layer)

    def advice(self, module: DiffusionModule) -> Iterator[Problem]:
        """Ranks above the width of their layers."""
        wide = [
            f"{part}.{path}: rank {layer.r[ADAPTER]}, {width} wide"
            for part, trained in module.trained.items()
            for path, layer in adapted(trained).items()
            if (width := self.width(layer)) is not None and layer.r[ADAPTER] > width
        ]
        if wide:
            message = f"above the width of {counted(len(wide), 'layer')}, where more of it adds numbers and no freedom"
            yield Problem("method.rank", f"{message}; lower it, or give these layers less by method.ranks", False, wide)

    # Files

    def export(self, module: DiffusionModule, path: Path) -> Path:
        """Write `<path>.safetensors`, the embeddings in it or beside, read back and compared with what is live."""
        bundled = self.embeddings.bundled(module) if self.bundle_embeddings else {}
        if not self.bundle_embeddings:
            self.embeddings.export(module, path)
        state = self.to_write(module)
        return exporting.export(module, state, path, self.header(module, state, path.name), bundled)

    def to_write(self, module: DiffusionModule) -> AdapterState:
        """The live adapter, as a file has it."""
        return live_state(module)

    def header(self, module: DiffusionModule, state: AdapterState, name: str) -> dict[str, str]:
        """What tools read; in PEFT's format also its settings, by which it builds the layers again."""
        network, arguments = self.network(state)
        fields = exporting.metadata(module, state, name=name, network=network, arguments=arguments)
        if module.output_options.format == LoraFormat.peft and self.kind is not LoraLayer:
            fields |= {f"peft.{part}": self.peft_settings(of_part) for part, of_part in state.items()}
        return fields

    def peft_settings(self, of_part: dict[str, AdapterLayer]) -> str:
        """The JSON of PEFT's settings for one part's layers, whose alpha is their rank; for LoRA nobody asks."""
        ranks = {lora_file.portable_text_path(path): lora_file.rank_of(x) or self.rank for path, x in of_part.items()}
        usual = Counter(ranks.values()).most_common(1)[0][0]
        others = patterns({path: rank for path, rank in ranks.items() if rank != usual})
        return json.dumps(self.config(one_of(ranks), Strength(usual, usual), others, others).to_dict())


def span(rows: int, columns: int, kernel: int = 1) -> int:
    """The rank by which a product gives any matrix [rows, columns]; with a kernel between its factors (Tucker), any
    tensor [rows, columns, kernel]."""
    return max(min(rows, columns * kernel), min(columns, rows * kernel))


def one_of(paths: Any) -> str:
    """A pattern that matches exactly these paths."""
    return "|".join(re.escape(path) for path in paths)


def patterns(values: dict[str, Any]) -> dict[str, Any]:
    """path -> value as PEFT takes it: one pattern a value, anchored because PEFT lets anything stand before it."""
    return {
        f"^(?:{one_of(path for path, other in values.items() if other == value)})": value
        for value in dict.fromkeys(values.values())
    }
