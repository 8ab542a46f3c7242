"""Embeddings: new words whose vectors train, alone or beside any other method."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from otl.config import SettingsError
from otl.formats import embedding as embedding_file
from otl.methods import specs, starts, vocabulary
from otl.methods import templates as sentences
from otl.methods.rows import Rows, Span, median_norm, pool_at_the_end
from otl.methods.specs import Spec
from otl.types import Cond, ParamGroup, Problem, Size
from otl.wording import show

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)


class Embeddings:
    """New words whose vectors train (https://arxiv.org/abs/2208.01618); the rest of the vocabulary stays as it is.

    Args:
        settings: name -> the fields of `Spec`; None or empty: there are none, and nothing is changed.
        templates: captions of images that have none, as `otl.methods.templates.chosen` takes them.

    Raises:
        SettingsError: one of them is wrong, or there are templates for no embedding.
    """

    def __init__(self, settings: dict[str, Any] | None, templates: str | list[str] | None) -> None:
        self.specs = specs.parse(settings)
        self.templates = sentences.chosen(templates)
        if self.templates:
            specs.require(self.specs, f"method.templates={show(templates)}")
        self.pattern = specs.pattern(self.specs.values())
        self.counts: dict[str, int] = {}  # name -> vectors; known once attached, as is the rest
        self.rows: dict[str, Rows] = {}  # text encoder -> what is new in it
        self.tokenizers: dict[str, tuple[Any, Any]] = {}  # of the pipeline: as it was loaded, with the new tokens

    def __bool__(self) -> bool:
        return bool(self.specs)

    def attach(self, module: DiffusionModule) -> list[ParamGroup]:
        """Put the new words into every text encoder; one group for each embedding and encoder.

        From then on `module.encode_prompt` takes captions with placeholders.
        """
        if not self:
            return []
        self.refuse(module)
        self.counts, self.rows, self.tokenizers = {}, {}, {}
        loaded = {name: starts.from_file(module, each) for name, each in self.specs.items() if each.file is not None}
        for name, each in self.specs.items():
            self.counts[name] = starts.count(module, each, loaded.get(name))
        for encoder in module.text_encoders:
            self.enlarge(module, encoder, loaded)
        self.wrap(module)
        self.start_outputs(module, loaded)
        module.embeddings = self
        return [
            ParamGroup(f"embedding.{name}.{encoder}", [rows.trained(name)], each.lr, each.stop_after)
            for name, each in self.specs.items()
            for encoder, rows in self.rows.items()
        ]

    # Words

    def captions(self, concept: str) -> list[str]:
        """Of an image of `concept` that has none of its own: the templates around its embedding's placeholder."""
        placeholders = {name: each.placeholder for name, each in self.specs.items()}
        return sentences.captions(self.templates, placeholders, concept) if self else []

    def rewrite(self, captions: Iterable[str]) -> list[str]:
        """Captions with the tokens of each embedding in the place of its placeholder."""
        tokens = {each.placeholder: "".join(self.tokens(each)) for each in self.specs.values()}
        return [self.pattern.sub(lambda found: tokens[found[0]], caption) for caption in captions]

    def tokens(self, each: Spec) -> list[str]:
        """What the tokenizer knows each vector as: nothing that a person would write."""
        number = list(self.specs).index(each.name)  # not the name: a family may make all letters small
        return [f"<|{number}:{k}|>" for k in range(self.counts[each.name])]

    def unused(self, captions: Iterable[str]) -> list[Problem]:
        """The embeddings whose placeholder no caption has: nothing would train them."""
        written = {found for caption in captions for found in self.pattern.findall(caption)}
        return [
            Problem(
                f"{each.key}.placeholder",
                f"{each.placeholder} is in no caption, so nothing would train it: write it into the captions, as it "
                f"is here, or give the images without any one, 'data.prompt=\"a photo of {each.placeholder}\"', "
                "or several, method.templates=object",
            )
            for each in self.specs.values()
            if each.placeholder not in written
        ]

    # Rows

    def refuse(self, module: DiffusionModule) -> None:
        """Raises SettingsError: the family reads no text, or not by tokens, or the files would have one name."""
        if not module.text_encoders:
            raise SettingsError(
                f"method.embeddings: {type(module).__name__} has no text encoder, so no word can be taught"
            )
        other = [name for name in module.text_encoders if not isinstance(module.part(name), PreTrainedModel)]
        if other:
            raise SettingsError(
                f"method.embeddings: the {other[0]} of {type(module).__name__} is no model of transformers', so there "
                "is no table of tokens that a new word could be put into; leave the embeddings out"
            )
        specs.refuse_name(self.specs, module.output_options.name)

    def enlarge(self, module: DiffusionModule, encoder: str, loaded: dict[str, dict[str, Tensor]]) -> None:
        """The new words in one text encoder and its tokenizer."""
        part, skeleton = module.part(encoder), starts.is_skeleton(module)
        table = part.get_input_embeddings()
        rows = {
            name: starts.rows(module, encoder, each, loaded.get(name), count=self.counts[name])
            for name, each in self.specs.items()
        }
        spans = {name: Span(0, n) for name, n in self.counts.items()} if skeleton else self.add(module, encoder)
        outputs = {name for name, each in self.specs.items() if each.output}
        new = Rows(
            table,
            spans,
            inputs={name: tensor for name, tensor in rows.items() if name not in outputs},
            fixed={name: tensor.clone() for name, tensor in rows.items() if name in outputs},
            outputs={name: tensor for name, tensor in rows.items() if name in outputs},
        )
        kept = [name for name, each in self.specs.items() if each.preserve_norm and not each.output]
        if kept and not skeleton:
            new.norms = dict.fromkeys(kept, median_norm(table.weight))
        part.set_input_embeddings(new)
        self.rows[encoder] = new

    def add(self, module: DiffusionModule, encoder: str) -> dict[str, Span]:
        """A copy of the tokenizer that knows the new tokens; name -> their ids."""
        name = vocabulary.tokenizer_name(encoder)
        original = getattr(module.pipeline, name)
        tokenizer, spans = vocabulary.enlarged(original, {each.name: self.tokens(each) for each in self.specs.values()})
        self.tokenizers[name] = original, tokenizer
        setattr(module.pipeline, name, tokenizer)
        pool_at_the_end(module.part(encoder), tokenizer.eos_token_id)
        return spans

    @torch.no_grad()
    def start_outputs(self, module: DiffusionModule, loaded: dict[str, dict[str, Tensor]]) -> None:
        """Output embeddings begin as what the text encoder makes of their first rows alone, or as their file says."""
        for name, each in self.specs.items():
            if not each.output:
                continue
            hidden = self.read(module, [each.placeholder])["hidden"]
            pieces = self.pieces(module, hidden)
            if starts.is_skeleton(module):
                continue
            for encoder, rows in self.rows.items():
                begun = loaded[name][encoder] if name in loaded else pieces[encoder][rows.place(name, hidden)[0]]
                rows.trained(name).copy_(begun)
                if each.preserve_norm:
                    rows.norms[name] = rows.trained(name).detach().norm(dim=1, keepdim=True)

    def settle(self, module: DiffusionModule) -> None:
        """Parts in which nothing but new words trains stay in eval mode: T5's dropout belongs to its own training."""
        words = {id(rows.trained(name)) for rows in self.rows.values() for name in self.specs}
        for part in module.trained.values():
            if {id(parameter) for parameter in part.parameters() if parameter.requires_grad} <= words:
                part.eval()

    def after_step(self, *_: Any) -> None:
        """A hook of the optimizer: vectors whose norm is preserved get it back."""
        for rows in self.rows.values():
            rows.keep_norms()

    # Encoding

    def wrap(self, module: DiffusionModule) -> None:
        """Placeholders in whatever is encoded, by whoever asks: training, validation, drawing, the cache."""
        outputs = any(each.output for each in self.specs.values())

        def encode_prompt(captions: list[str]) -> Cond:
            cond = self.read(module, captions)
            if not outputs:
                return cond
            return cond | {"hidden": self.with_outputs(module, cond["hidden"])}

        module.encode_prompt = encode_prompt  # type: ignore[method-assign]

    def read(self, module: DiffusionModule, captions: list[str]) -> Cond:
        """What the family's text encoders make of captions, the rows of the new words among their inputs."""
        return type(module).encode_prompt(module, self.rewrite(captions))

    def with_outputs(self, module: DiffusionModule, hidden: Tensor) -> Tensor:
        """[B, L, D] of the prompts just read -> the same with the output embeddings in the places of their tokens."""
        pieces = self.pieces(module, hidden)
        return torch.cat([rows.replace(pieces[encoder]) for encoder, rows in self.rows.items()], dim=-1)

    def pieces(self, module: DiffusionModule, hidden: Tensor) -> dict[str, Tensor]:
        """text encoder -> its share of [B, L, D]: they lie side by side, in their order."""
        widths = [vocabulary.table(module.part(encoder)).shape[1] for encoder in module.text_encoders]
        if sum(widths) != hidden.shape[-1]:
            raise SettingsError(
                f"method.embeddings: {type(module).__name__} does not read its text encoders' results side by side, so "
                "output=true has no place there; leave it out"
            )
        return dict(zip(module.text_encoders, hidden.split(widths, dim=-1)))

    # Files

    def state(self) -> dict[str, dict[str, Tensor]]:
        """name -> text encoder -> [n, D] what was trained, fp32 on the CPU."""
        return {
            name: {encoder: rows.trained(name).detach().float().cpu() for encoder, rows in self.rows.items()}
            for name in self.specs
        }

    def tensors(self, module: DiffusionModule) -> dict[str, dict[str, Tensor]]:
        """name -> the tensors of its file."""
        return {
            name: embedding_file.to_file(vectors, keys=module.embedding_keys, output=self.specs[name].output)
            for name, vectors in self.state().items()
        }

    def bundled(self, module: DiffusionModule) -> dict[str, Tensor]:
        """All of them under the keys by which a LoRA file carries them along."""
        each = [embedding_file.to_bundle(tensors, name) for name, tensors in self.tensors(module).items()]
        return {key: tensor for tensors in each for key, tensor in tensors.items()}

    def export(self, module: DiffusionModule, path: Path) -> list[Path]:
        """Write `<name>.safetensors` for each beside the result `path`, verified.

        Args:
            path: of the run's result; what follows output.name in it, such as -step-000500, follows each name too.
        """
        end = path.name.removeprefix(module.output_options.name)
        return [self.write(module, name, path.with_name(f"{name}{end}.safetensors")) for name in self.specs]

    def write(self, module: DiffusionModule, name: str, file: Path) -> Path:
        """One embedding's file, read back and compared."""
        header = embedding_file.metadata(
            architecture=module.architecture,
            title=name,
            resolution=Size(module.data_resolution, module.data_resolution),
            prediction=getattr(module.noise_schedule, "prediction", "epsilon"),
            placeholder=self.specs[name].placeholder,
            vectors=self.counts[name],
        )
        embedding_file.write(file, self.tensors(module)[name], header, dtype=module.output_options.dtype)
        return file

    @contextlib.contextmanager
    def put_away(self, module: DiffusionModule) -> Iterator[None]:
        """The text encoders and tokenizers without the new words, as other programs know them."""
        for encoder, rows in self.rows.items():
            module.part(encoder).set_input_embeddings(rows.table)
        for name, (original, _) in self.tokenizers.items():
            setattr(module.pipeline, name, original)
        try:
            yield
        finally:
            for encoder, rows in self.rows.items():
                module.part(encoder).set_input_embeddings(rows)
            for name, (_, enlarged) in self.tokenizers.items():
                setattr(module.pipeline, name, enlarged)
