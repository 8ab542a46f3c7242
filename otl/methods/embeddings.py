"""Embeddings: new words whose vectors train, alone or beside any other method."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from otl import rng
from otl.config import SettingsError
from otl.formats import embedding as embedding_file
from otl.methods import specs
from otl.methods.rows import Rows, Span, median_norm, pool_at_the_end, random_rows
from otl.methods.specs import Spec
from otl.types import Cond, ParamGroup, Problem, Size

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)


class Embeddings:
    """New words whose vectors train (https://arxiv.org/abs/2208.01618); the rest of the vocabulary stays as it is.

    Args:
        settings: name -> the fields of `Spec`; None or empty: there are none, and nothing is changed.
    """

    def __init__(self, settings: dict[str, Any] | None) -> None:
        self.specs = specs.parse(settings)
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
        meta = vocabulary(module.part(module.text_encoders[0])).device.type == "meta"
        loaded = {name: self.from_file(module, each) for name, each in self.specs.items() if each.file is not None}
        for name, each in self.specs.items():
            self.counts[name] = self.count(module, each, loaded.get(name), meta=meta)
        for encoder in module.text_encoders:
            self.enlarge(module, encoder, loaded, meta=meta)
        self.wrap(module)
        if not meta:
            self.start_outputs(module, loaded)
        module.embeddings = self
        return [
            ParamGroup(f"embedding.{name}.{encoder}", [rows.trained(name)], each.lr, each.stop_after)
            for name, each in self.specs.items()
            for encoder, rows in self.rows.items()
        ]

    # Words

    def rewrite(self, captions: Iterable[str]) -> list[str]:
        """Captions with the tokens of each embedding in the place of its placeholder."""
        tokens = {each.placeholder: "".join(self.tokens(each)) for each in self.specs.values()}
        return [self.pattern.sub(lambda found: tokens[found[0]], caption) for caption in captions]

    def tokens(self, each: Spec) -> list[str]:
        """What the tokenizer knows each vector as: nothing that a person would write."""
        return [f"<|{each.name}:{k}|>" for k in range(self.counts[each.name])]

    def unused(self, captions: Iterable[str]) -> list[Problem]:
        """The embeddings whose placeholder no caption has: nothing would train them."""
        written = {found for caption in captions for found in self.pattern.findall(caption)}
        return [
            Problem(
                f"{each.key}.placeholder",
                f"{each.placeholder} is in no caption, so nothing would train it: write it into the captions as it is "
                "here, give one caption for all with data.prompt=..., or, for images without captions, "
                "method.templates=object",
            )
            for each in self.specs.values()
            if each.placeholder not in written
        ]

    # Rows

    def refuse(self, module: DiffusionModule) -> None:
        """Raises SettingsError: the family reads no text, or the files would have one name."""
        if not module.text_encoders:
            raise SettingsError(
                f"method.embeddings: {type(module).__name__} has no text encoder, so no word can be taught"
            )
        if (name := module.output_options.name) in self.specs:
            raise SettingsError(
                f"method.embeddings.{name}: output.name={name} already names the run's result: rename one of them"
            )

    def count(self, module: DiffusionModule, each: Spec, loaded: dict[str, Tensor] | None, *, meta: bool) -> int:
        """How many vectors an embedding has."""
        key = each.key
        if loaded is not None:
            found = len(next(iter(loaded.values())))
            if each.vectors not in (None, found):
                raise SettingsError(f"{key}.vectors={each.vectors}: {each.file} has {found}; leave vectors out")
            return found
        if meta:  # a skeleton has no tokenizer to ask, and a few rows more or less change no plan
            return each.vectors or len((each.init or "*").split())
        tokenizer = getattr(module.pipeline, tokenizer_name(module.text_encoders[0]))
        words = ids(tokenizer, each.init) if each.init else []
        if each.init is not None and not words:
            raise SettingsError(f"{key}.init={each.init!r}: no word that the tokenizer knows; give one, or null")
        count = each.vectors or len(words) or 1
        if len(words) > count:
            log.warning(f"{key}.init={each.init!r} takes {len(words)} tokens: the first {count} are used")
        if count > (room := tokenizer.model_max_length - 2):
            raise SettingsError(f"{key}.vectors={count}: a prompt has room for {room} tokens")
        if known(tokenizer, each.placeholder):
            log.warning(
                f"{key}.placeholder={each.placeholder} is a word that the model knows already: in this run it means "
                f"the new vectors alone, and diffusers will not load them under that name; <{each.name}> would be free"
            )
        return count

    def from_file(self, module: DiffusionModule, each: Spec) -> dict[str, Tensor]:
        """text encoder -> [n, D] the vectors of `file`."""
        try:
            tensors = embedding_file.read(Path(str(each.file)).expanduser())
            return embedding_file.from_file(
                embedding_file.from_bundle(tensors, each.name),
                keys=module.embedding_keys,
                widths={encoder: vocabulary(module.part(encoder)).shape[1] for encoder in module.text_encoders},
                output=each.output,
            )
        except SettingsError as error:
            raise SettingsError(f"{each.key}.file={each.file}: {error}") from error

    def enlarge(
        self, module: DiffusionModule, encoder: str, loaded: dict[str, dict[str, Tensor]], *, meta: bool
    ) -> None:
        """The new words in one text encoder and its tokenizer."""
        part = module.part(encoder)
        table = part.get_input_embeddings()
        spans = {name: Span(0, count) for name, count in self.counts.items()} if meta else self.add(module, encoder)
        rows = {name: self.start(module, encoder, each, loaded, meta=meta) for name, each in self.specs.items()}
        outputs = {name for name, each in self.specs.items() if each.output}
        new = Rows(
            table,
            spans,
            inputs={name: tensor for name, tensor in rows.items() if name not in outputs},
            fixed={name: tensor.clone() for name, tensor in rows.items() if name in outputs},
            outputs={name: tensor for name, tensor in rows.items() if name in outputs},
        )
        kept = [name for name, each in self.specs.items() if each.preserve_norm and not each.output]
        if kept and not meta:
            new.norms = dict.fromkeys(kept, median_norm(table.weight))
        part.set_input_embeddings(new)
        self.rows[encoder] = new

    def add(self, module: DiffusionModule, encoder: str) -> dict[str, Span]:
        """A copy of the tokenizer that knows the new tokens; name -> their ids."""
        name = tokenizer_name(encoder)
        original = getattr(module.pipeline, name)
        tokenizer = copy.deepcopy(original)
        # What stands before a token is then split as if the prompt ended there: no stray space.
        tokens = {
            each.name: [AddedToken(token, lstrip=True, normalized=False) for token in self.tokens(each)]
            for each in self.specs.values()
        }
        for added in tokens.values():
            tokenizer.add_tokens(added)
        self.tokenizers[name] = original, tokenizer
        setattr(module.pipeline, name, tokenizer)
        pool_at_the_end(module.part(encoder), tokenizer.eos_token_id)
        firsts = {each: tokenizer.convert_tokens_to_ids(str(added[0])) for each, added in tokens.items()}
        return {each: Span(first, self.counts[each]) for each, first in firsts.items()}

    def start(
        self,
        module: DiffusionModule,
        encoder: str,
        each: Spec,
        loaded: dict[str, dict[str, Tensor]],
        *,
        meta: bool,
    ) -> Tensor:
        """[n, D] fp32 what an embedding begins as, a function of the seed."""
        table, count = vocabulary(module.part(encoder)), self.counts[each.name]
        if meta:
            return torch.empty(count, table.shape[1], dtype=torch.float32, device="meta")
        if each.name in loaded and not each.output:
            return loaded[each.name][encoder].to(table.device)
        if each.init is None:
            generator = rng.generator(module.seed, "embedding", each.name, encoder)
            return random_rows(table, count, generator).to(table.device)
        words = ids(getattr(module.pipeline, tokenizer_name(encoder)), each.init)
        chosen = torch.tensor([words[k % len(words)] for k in range(count)], device=table.device)
        return table[chosen].detach().to(torch.float32, copy=True)

    @torch.no_grad()
    def start_outputs(self, module: DiffusionModule, loaded: dict[str, dict[str, Tensor]]) -> None:
        """Output embeddings begin as what the text encoder makes of their first rows alone, or as their file says."""
        for name, each in self.specs.items():
            if not each.output:
                continue
            hidden = self.read(module, [each.placeholder])["hidden"]
            pieces = self.pieces(module, hidden)
            for encoder, rows in self.rows.items():
                own, _ = rows.spans[name].place(self.ids(module, encoder, [each.placeholder], hidden.shape[1]))
                begun = loaded[name][encoder] if name in loaded else pieces[encoder][own]
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
            return cond | {"hidden": self.with_outputs(module, cond["hidden"], captions)}

        module.encode_prompt = encode_prompt  # type: ignore[method-assign]

    def read(self, module: DiffusionModule, captions: list[str]) -> Cond:
        """What the family's text encoders make of captions, the rows of the new words among their inputs."""
        return type(module).encode_prompt(module, self.rewrite(captions))

    def with_outputs(self, module: DiffusionModule, hidden: Tensor, captions: list[str]) -> Tensor:
        """[B, L, D] of B captions -> the same with the output embeddings in the places of their tokens."""
        pieces = self.pieces(module, hidden)
        return torch.cat(
            [
                rows.replace(pieces[encoder], self.ids(module, encoder, captions, hidden.shape[1]).to(hidden.device))
                for encoder, rows in self.rows.items()
            ],
            dim=-1,
        )

    def pieces(self, module: DiffusionModule, hidden: Tensor) -> dict[str, Tensor]:
        """text encoder -> its share of [B, L, D]: they lie side by side, in their order."""
        widths = [vocabulary(module.part(encoder)).shape[1] for encoder in module.text_encoders]
        if sum(widths) != hidden.shape[-1]:
            raise SettingsError(
                f"method.embeddings: {type(module).__name__} does not read its text encoders' results side by side, so "
                "output=true has no place there; leave it out"
            )
        return dict(zip(module.text_encoders, hidden.split(widths, dim=-1)))

    def ids(self, module: DiffusionModule, encoder: str, captions: list[str], length: int) -> Tensor:
        """[B, L] the tokens that the text encoder reads."""
        tokenizer = getattr(module.pipeline, tokenizer_name(encoder))
        return tokenizer(
            self.rewrite(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

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


def tokenizer_name(encoder: str) -> str:
    """The pipeline's name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


def vocabulary(part: nn.Module) -> Tensor:
    """[V, D] the table of a text encoder's words."""
    return part.get_input_embeddings().weight


def ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without those that begin and end a prompt."""
    return tokenizer(text, add_special_tokens=False).input_ids


def known(tokenizer: Any, word: str) -> bool:
    """Whether a word is one entry of the vocabulary; CLIP's mark those that end a word."""
    return bool({word, word.lower(), f"{word.lower()}</w>"} & set(tokenizer.get_vocab()))
