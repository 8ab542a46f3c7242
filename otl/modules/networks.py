"""The networks of a family: how they are loaded, found by name, moved, let go and told apart."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from otl import agreement, noise
from otl.config import SettingsError
from otl.formats.stored import Stored, in_file, of_network
from otl.methods.parts import pipeline_name
from otl.modules import ahead, drawing, inpainting, loading
from otl.timesteps import Timesteps

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
IDLE = frozenset(  # names of a config that say nothing of what a network gives that does not train
    "architectures model_type transformers_version dtype torch_dtype sample_size force_upcast use_cache output_past "
    "n_positions bos_token_id decoder_start_token_id num_decoder_layers".split()
)
IDLE_PARTS = re.compile("^_|dropout|initializer")


class Networks(LightningModule):
    """What a `DiffusionModule` does with its networks; its attributes are declared there."""

    def configure_model(self) -> None:
        """Load the weights, freeze them, and let the method make trainable what it trains. Once.

        All of it on the CPU, from where Lightning moves what trains: it makes its device torch's default for this
        hook, and a schedule, a table or an adapter's first numbers would be the GPU's.
        """
        if self.pipeline is not None:
            return
        with torch.device("cpu"):
            if self.encodes_ahead and ahead.possible(self):
                self.pipeline = ahead.assemble(self, ahead.encode(self))
            else:
                self.pipeline = self.load_pipeline()
            self.to("cpu")  # where a method may ask it to encode; Lightning has said already that it is on its device
            self.prepare()
            if self.inpaints:
                self.pipeline = inpainting.stock_pipeline(self)

    def build_skeleton(self) -> None:
        """The same without weights, on the meta device: enough to plan."""
        self.pipeline = self.load_skeleton()
        self.to("meta")  # where a method may ask it to encode
        self.prepare()

    def load_encoders(self) -> None:
        """All but the denoiser with weights, and that without: enough to fill the cache."""
        denoiser = getattr(self.load_skeleton(), self.denoiser)
        self.pipeline = self.load_pipeline(without=[self.denoiser])
        setattr(self.pipeline, self.denoiser, denoiser)
        self.prepare()

    def load_pipeline(self, without: Sequence[str] = ()) -> Any:
        """The pipeline with its weights on the CPU; a family that makes its own overrides it.

        Args:
            without: parts that may be left out.
        """
        return loading.load(self, self.checkpoint, dtypes=self.part_dtypes(), without=without)

    def load_skeleton(self) -> Any:
        """The parts of the pipeline on the meta device; a family that makes its own overrides it."""
        return loading.skeleton(self, self.checkpoint)

    def load_part(self, name: str) -> nn.Module:
        """One part anew, with its weights on the CPU."""
        return loading.load_part(self, name, dtype=self.part_dtypes().get(name, self.part_dtypes()["default"]))

    def stored_part(self, name: str) -> Stored | None:
        """The weights of one part where the checkpoint has them, each read when asked for; None: only `load_part` can
        read them."""
        file = Path(self.checkpoint).expanduser()
        if not file.is_file():
            return loading.stored(self.part(name), self.checkpoint, name)
        if name not in self.file_texts:
            return None
        layout, prefix = self.file_texts[name]
        return of_network(self.part(name), layout.read(prefix, in_file(file)))

    def weights(self, name: str) -> Mapping[str, Tensor]:
        """The weights of one part; of one that was let go, from the checkpoint, each when asked for."""
        if name not in self.released:
            return self.part(name).state_dict()
        found = self.stored_part(name)
        assert found is not None, "`readable` is around"
        return found

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """`weights` has those of every part: what was let go and lies nowhere to be read from is loaded meanwhile."""
        with self.recovered([name for name in self.released if self.stored_part(name) is None]):
            yield

    def prepare(self) -> None:
        for name in self.part_names:
            self.part(name).requires_grad_(False).eval()
        self.noise_schedule = self.make_noise()
        self.timesteps = Timesteps.of(self.noise_options)
        agreement.require_weight(self.loss_options.weight, self.noise_schedule.prediction)
        self.last_snr = noise.last_snr(self.noise_schedule) if self.noise_options.offset_generalized else None
        if self.method is not None:
            self.groups = self.method.attach(self)
            names = [name for name in self.part_names if any(p.requires_grad for p in self.part(name).parameters())]
            self.trained = nn.ModuleDict({name: self.part(name).train() for name in names})
            if self.embeddings is not None:
                self.embeddings.settle(self)
        if self.gradient_checkpointing:
            for part in self.trained.values():
                enable_checkpointing(part)

    def part_dtypes(self) -> dict[str, torch.dtype]:
        """part -> dtype to load it in. The image encoder is kept in fp32: SDXL's overflows in fp16, and its work is
        cached. So is what trains whole."""
        dtype = (self.autocast_dtype or torch.float32) if self.dtype_name == "auto" else DTYPES.get(self.dtype_name)
        if dtype is None:
            raise SettingsError(f"model.dtype={self.dtype_name}: accepted are auto, {', '.join(DTYPES)}")
        whole = self.method.whole_parts if self.method is not None else ()
        exact = [self.image_encoder, *map(self.part_name, whole)]
        return {"default": dtype} | dict.fromkeys(exact, torch.float32)

    def part(self, name: str) -> nn.Module:
        """A network of the pipeline by name; "denoiser" is the one that predicts."""
        return getattr(self.pipeline, self.part_name(name))

    def part_name(self, name: str) -> str:
        """The pipeline's name of a part.

        Raises:
            SettingsError: this family has no such part.
        """
        family = type(self).__name__
        return pipeline_name(name, family=family, denoiser=self.denoiser, part_names=self.part_names)

    @property
    def inpaints(self) -> bool:
        """Whether the denoiser takes a mask and the masked picture beside the noisy latents."""
        if self.inpaint_pipeline_class is None:
            return False
        return self.part("denoiser").config.in_channels == inpainting.CHANNELS  # type: ignore[union-attr]

    @property
    def trains_text(self) -> bool:
        """Whether a text encoder trains, so that its output cannot be cached."""
        return any(name in self.trained for name in self.text_encoders)

    def keep_prompts(self) -> None:
        """Encode what will be drawn."""
        options = self.sample_options
        texts = [*options.prompts, options.negative_prompt] if options.prompts else []
        self.kept_prompts = drawing.encoded(self, texts, batch_size=options.batch_size)

    def release(self, names: Iterable[str]) -> None:
        """Let go of the weights of frozen parts; `recover` loads them again."""
        for name in names:
            if name not in self.released:
                self.part(name).to("meta")
                self.released.add(name)

    def recover(self, names: Iterable[str] | None = None) -> None:
        """Load again what was let go, all of it or the named parts."""
        for name in [name for name in self.part_names if name in self.released and (names is None or name in names)]:
            setattr(self.pipeline, name, self.load_part(name).requires_grad_(False).eval())
            self.released.discard(name)

    @contextlib.contextmanager
    def recovered(self, names: Iterable[str] | None = None) -> Iterator[None]:
        """What was let go, all of it or of the named parts, is there meanwhile and goes again."""
        gone = self.released.intersection(self.part_names if names is None else names)
        self.recover(gone)
        try:
            yield
        finally:
            self.release(gone)

    def move_frozen(self, device: torch.device, all_but: tuple[str, ...] = ()) -> None:
        """Move the parts that Lightning does not see."""
        for name in self.part_names:
            if name not in self.trained and name not in all_but and name not in self.released and name != self.denoiser:
                self.part(name).to(device)
        self.part(self.denoiser).to(self.device)

    def image_identity(self) -> str:
        part = self.part(self.image_encoder)
        return fingerprint(part, f"{type(part).__name__} {structure(part)}")

    def prompt_identity(self) -> str:
        if self.kept_identity is not None:
            return self.kept_identity
        family = f"{type(self).__module__}.{type(self).__qualname__}"  # which layers it reads
        words = [described(value) for name, value in self.pipeline.components.items() if name.startswith("tokenizer")]
        label = hashlib.blake2b(f"{family} {self.reading} {words}".encode(), digest_size=16).hexdigest()
        encoders = {name: self.part(name) for name in self.text_encoders}
        return " ".join(fingerprint(part, f"{label} {name} {structure(part)}") for name, part in encoders.items())

    @property
    def reading(self) -> str:
        """What else `encode_prompt` depends on, besides text encoders and tokenizers."""
        return ""


def enable_checkpointing(part: Any) -> None:
    """diffusers and transformers, older and newer, name the same switch differently."""
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(part, name) for name in names if hasattr(part, name))()


def fingerprint(part: nn.Module, label: str) -> str:
    """A hash of a network's weights, dtype included."""
    digest = hashlib.blake2b(label.encode(), digest_size=16)
    for name, tensor in part.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def structure(part: Any) -> str:
    """What else than weights decides what a network gives, such as its activations: its config, without the idle."""
    config = part.config if isinstance(part.config, Mapping) else part.config.to_diff_dict()  # diffusers, transformers
    kept = {name: value for name, value in config.items() if name not in IDLE and not IDLE_PARTS.search(name)}
    return json.dumps(kept, sort_keys=True, default=str)


def described(tokenizer: Any) -> str:
    """All that a tokenizer's ids depend on, and nothing that the last call left there."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in rules.items() if key not in {"truncation", "padding"}}
    return f"{tokenizer.model_max_length} {json.dumps(rules, sort_keys=True)}"
