"""What an image's mask is white on: what a text names, what stands in front, or what has a colour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageColor
from torch import Tensor
from torch.nn import functional

from otl.config import SettingsError
from otl.tools.checkpoints import explained, file_of, located, pretrained
from otl.tools.onnx import Onnx

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

KEY = "masker.checkpoint"


class TextMasker:
    """CLIPSeg (https://arxiv.org/abs/2112.10003): what a text names.

    Args:
        prompts: texts; white is what any of them names.
        checkpoint: hub name or local folder.
        threshold: from which the network is believed, 0..1; the lower, the larger the mask.
    """

    def __init__(self, prompts: list[str], checkpoint: str, *, threshold: float = 0.3) -> None:
        self.prompts, self.checkpoint, self.threshold = prompts, checkpoint, threshold
        self.network: Any = None  # this and the processor come with `load`
        self.processor: Any = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """In fp32 whatever the dtype: it is small.

        Raises:
            SettingsError: the checkpoint is no CLIPSeg, there is no prompt, or one is too long.
        """
        import transformers

        if not self.prompts:
            raise SettingsError(
                "masker.prompts: there are none; name what is to be white, such as 'masker.prompts=[a dog]'"
            )
        where = located(KEY, self.checkpoint) or self.checkpoint
        with explained(KEY, self.checkpoint):
            kind = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False).model_type
        if kind != "clipseg":
            raise SettingsError(f"{KEY}={self.checkpoint}: it is a {kind}; accepted is clipseg")
        kind = transformers.CLIPSegForImageSegmentation
        self.network = pretrained(KEY, self.checkpoint, kind, dtype=torch.float32).to(device)
        with explained(KEY, self.checkpoint):
            self.processor = transformers.AutoProcessor.from_pretrained(where, trust_remote_code=False)
        longest = self.network.config.text_config.max_position_embeddings
        for prompt in self.prompts:
            if len(self.processor.tokenizer(prompt)["input_ids"]) > longest:
                raise SettingsError(f"masker.prompts: {prompt!r} is longer than {longest} tokens: shorten it")

    @torch.inference_mode()
    def masks(self, images: list[Picture]) -> list[np.ndarray]:
        """Bool [h, w] for each image, in its size."""
        texts = [prompt for prompt in self.prompts for _ in images]
        inputs = self.processor(text=texts, images=images * len(self.prompts), padding=True, return_tensors="pt")
        logits = self.network(**inputs.to(self.network.device)).logits
        best = logits.view(len(self.prompts), len(images), *logits.shape[-2:]).amax(0).sigmoid()
        return [spread(one, image) >= self.threshold for one, image in zip(best, images)]


class SubjectMasker:
    """What stands in front: networks that remove backgrounds, such as U2-Net, as rembg publishes them in ONNX files.

    Args:
        checkpoint: a local file, or a folder or hub name with a model.onnx.
        threshold: from which the network is believed, 0..1.
        mean, std: of red, green and blue in 0..1, by which the network wants its image normalised.
        side: pixels per side of the square that it is shown, where the file takes any.
        logits: whether a sigmoid is still to be taken of what it gives.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        threshold: float = 0.5,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        side: int = 320,
        logits: bool = False,
    ) -> None:
        self.checkpoint, self.threshold, self.side, self.logits = checkpoint, threshold, side, logits
        self.mean, self.std = np.float32(mean), np.float32(std)
        self.network: Any = None  # comes with `load`

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises SettingsError: the file is no network from images to masks, or masker.std is not above 0."""
        self.network = Onnx(KEY, file_of(KEY, self.checkpoint, "model.onnx"), device)
        taken, given = self.network.takes, self.network.gives
        if len(taken) != 4 or taken[1] != 3 or len(given) != 4:
            raise SettingsError(
                f"{KEY}={self.checkpoint}: it makes {given} of {taken}; it should make [N, 1, H, W] of [N, 3, H, W]"
            )
        if isinstance(taken[2], int):
            self.side = taken[2]
        if self.std.min() <= 0:
            raise SettingsError(f"masker.std={self.std.tolist()}: every value must be above 0")

    def masks(self, images: list[Picture]) -> list[np.ndarray]:
        """Bool [h, w] for each image, in its size."""
        found = torch.from_numpy(self.network.run([self.levels(image) for image in images]))[:, 0].float()
        found = found.sigmoid() if self.logits else found
        return [spread(stretched(one), image) >= self.threshold for one, image in zip(found, images)]

    def levels(self, image: Picture) -> np.ndarray:
        """[3, side, side] float32: the brightest level is 1, then normalised."""
        scaled = np.asarray(image.resize((self.side, self.side), Image.Resampling.LANCZOS), np.float32)
        normalised = (scaled / max(scaled.max(), 1e-6) - self.mean) / self.std
        return np.ascontiguousarray(normalised.transpose(2, 0, 1))


class ColourMasker:
    """What has one of a few colours.

    Args:
        colours: names such as lime, or #rrggbb.
        tolerance: by how much red, green and blue may each differ, 0..255.
    """

    def __init__(self, colours: list[str], *, tolerance: int = 0) -> None:
        self.colours, self.tolerance = colours, tolerance

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises SettingsError: there is no colour, or one that is none."""
        if not self.colours:
            raise SettingsError(
                "masker.colours: there are none; name what is to be white, such as 'masker.colours=[lime]'"
            )
        for colour in self.colours:
            try:
                ImageColor.getrgb(colour)
            except ValueError as error:
                raise SettingsError(
                    f"masker.colours: {colour} is no colour: give a name such as lime, or #rrggbb"
                ) from error

    def masks(self, images: list[Picture]) -> list[np.ndarray]:
        """Bool [h, w] for each image."""
        colours = np.array([ImageColor.getrgb(colour)[:3] for colour in self.colours], np.int16)
        return [near(np.asarray(image), colours, self.tolerance) for image in images]


def near(pixels: np.ndarray, colours: np.ndarray, tolerance: int) -> np.ndarray:
    """[h, w, 3] in 0..255, [C, 3] -> bool [h, w]: whether every channel is that near to those of one colour."""
    far = [np.abs(pixels.astype(np.int16) - colour).max(axis=2) for colour in colours]
    return np.min(far, axis=0) <= tolerance


def stretched(values: Tensor) -> Tensor:
    """[h, w] -> 0..1 from the smallest to the largest; all 0 where they are one and the same."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else torch.zeros_like(values)


def spread(values: Tensor, image: Picture) -> np.ndarray:
    """[h, w] over the whole image, whatever the size -> float32 in the image's."""
    size = (image.height, image.width)
    return functional.interpolate(values[None, None].float(), size=size, mode="bilinear")[0, 0].cpu().numpy()
