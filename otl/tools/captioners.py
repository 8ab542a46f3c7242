"""Captions by BLIP, BLIP-2 and Florence-2: transformers' own classes, chosen by the checkpoint's config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from otl.config import SettingsError
from otl.tools.checkpoints import explained, located, pretrained

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "captioner.checkpoint"


class Blip:
    """https://arxiv.org/abs/2201.12086"""

    network_class = "BlipForConditionalGeneration"

    @staticmethod
    def prepare(processor: Any, network: Any, prompt: str) -> None:
        """Make processor and network agree, or refuse."""

    @staticmethod
    def repeated(network: Any, given: int) -> int:
        """How many of the ids that come out are the prompt's, of which `given` went in: not the one that ended it."""
        return max(0, given - 1)


class Blip2(Blip):
    """https://arxiv.org/abs/2301.12597"""

    network_class = "Blip2ForConditionalGeneration"

    @staticmethod
    def prepare(processor: Any, network: Any, prompt: str) -> None:
        if network.config.image_token_id is None:
            raise SettingsError(
                f"{KEY}: its config has no image_token_index, so that the image would have no place in the prompt: "
                "take a newer copy of the checkpoint"
            )
        processor.num_query_tokens = network.config.num_query_tokens  # older copies do not say it

    @staticmethod
    def repeated(network: Any, given: int) -> int:
        return 0 if network.language_model.config.is_encoder_decoder else given


class Florence2(Blip):
    """https://arxiv.org/abs/2311.06242"""

    network_class = "Florence2ForConditionalGeneration"

    @staticmethod
    def prepare(processor: Any, network: Any, prompt: str) -> None:
        """Refuse the tasks whose answers are places in the image."""
        answers = processor.tasks_answer_post_processing_type
        if answers.get(prompt, "pure_text") != "pure_text":
            texts = ", ".join(task for task in processor.task_prompts_without_inputs if answers[task] == "pure_text")
            raise SettingsError(f"captioner.prompt={prompt}: its answer is no caption; those that are: {texts}")

    @staticmethod
    def repeated(network: Any, given: int) -> int:
        return 0


FAMILIES: dict[str, type[Blip]] = {"blip": Blip, "blip-2": Blip2, "florence2": Florence2}  # by model_type


class Captioner:
    """A network that is shown an image and writes.

    Args:
        checkpoint: hub name or local folder.
        prompt: what it goes on from, no part of the caption; for Florence-2 its task, such as <MORE_DETAILED_CAPTION>.
        max_tokens: of a caption at most.
        beams: sequences that are followed at once; 1: the likeliest token is taken each time.
    """

    def __init__(self, checkpoint: str, *, prompt: str = "", max_tokens: int = 64, beams: int = 1) -> None:
        self.checkpoint, self.prompt, self.max_tokens, self.beams = checkpoint, prompt, max_tokens, beams
        self.family: type[Blip] = Blip
        self.network: Any = None  # this and the processor come with `load`
        self.processor: Any = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises SettingsError: the checkpoint or the prompt is of no kind that writes captions."""
        import transformers

        where = located(KEY, self.checkpoint) or self.checkpoint
        with explained(KEY, self.checkpoint):
            kind = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False).model_type
        if kind not in FAMILIES:
            raise SettingsError(f"{KEY}={self.checkpoint}: it is a {kind}; accepted are {', '.join(FAMILIES)}")
        self.family = FAMILIES[kind]
        self.network = pretrained(KEY, self.checkpoint, getattr(transformers, self.family.network_class), dtype=dtype)
        self.network.to(device)
        with explained(KEY, self.checkpoint):
            self.processor = transformers.AutoProcessor.from_pretrained(where, trust_remote_code=False)
        self.family.prepare(self.processor, self.network, self.prompt)

    @torch.inference_mode()
    def captions(self, images: list[Image]) -> list[str]:
        """One for each image, as the network writes it."""
        inputs = self.processor(images=images, text=[self.prompt] * len(images), return_tensors="pt")
        inputs = inputs.to(self.network.device, self.network.dtype)
        given = inputs["input_ids"].shape[1]
        ids = self.network.generate(**inputs, max_new_tokens=self.max_tokens, num_beams=self.beams, do_sample=False)
        repeated = self.family.repeated(self.network, given)
        return self.processor.batch_decode(ids[:, repeated:], skip_special_tokens=True)
