"""The runs that are tried: between them every method and every kind of family, and in each several kinds of chance."""

from __future__ import annotations

from dataclasses import dataclass

from tests.cells import METHODS

STEPS = 5


@dataclass(frozen=True)
class Trial:
    """One run that is tried."""

    family: str
    method: str
    more: tuple[str, ...] = ()  # of its line
    side: int = 64  # pixels

    @property
    def line(self) -> list[str]:
        return [*LINE, f"data.resolution={self.side}", *METHODS[self.method], *self.more]


# Five images in batches of two are three batches an epoch, and so two optimizer steps, of which the second has one.
LINE = [
    "data.batch_size=2",
    "data.validation_share=0.2",
    "data.image_variations=2",
    "data.augment.flip=0.5",
    "data.augment.brightness=0.2",
    "data.augment.crop_jitter=0.5",
    "data.captions.shuffle=true",
    "data.captions.tag_dropout=0.3",
    "data.caption_variants=3",
    "data.caption_dropout=0.2",
    "trainer.accumulate_grad_batches=2",
    "trainer.val_check_interval=3",
    "logger=none",
    "output.dtype=fp32",
    "optimizer.lr=1e-3",
    "scheduler=cosine",
    f"trainer.max_steps={STEPS}",
    "callbacks.checkpoint.every=1",
    "callbacks.checkpoint.best=true",
    "callbacks.checkpoint.wait=0",
    "callbacks.ema.decay=0.6",
    "callbacks.export.every=2",
    "callbacks.sampling.every=4",
    "callbacks.sampling.first=false",
    "callbacks.progress=null",
    "sample.prompts=[a cat]",
    "sample.steps=1",
    "resume=auto",
]
DROPOUT = "method.dropout=0.2"
BOTH = "method.parts={denoiser: {}, text_encoder: {lr: 1e-3}}"  # the text encoder trains too, so no caption is cached
TRIALS = {
    "lora": Trial("sd15", "lora", (DROPOUT,)),
    "dora": Trial("sd15", "dora", (DROPOUT, "optimizer=lion", "trainer.val_check_interval=null")),
    "loha": Trial("sd15", "loha", (DROPOUT, BOTH)),
    "lokr": Trial("sd15", "lokr", (DROPOUT, "data.cache=false")),
    "oft": Trial("sd15", "oft", (DROPOUT, "trainer.accumulate_grad_batches=1")),
    "finetune": Trial("sd15", "finetune", ("optimizer=adafactor",)),
    "embedding": Trial("sd15", "embedding", ("trainer.val_check_interval=1",)),
    "lora and embedding": Trial("sd15", "lora + embedding", (DROPOUT,)),
    "inpaint": Trial("sd15", "inpaint", ("optimizer=prodigy", "optimizer.lr=1")),
    "lora of SDXL": Trial("sdxl", "lora", (DROPOUT, BOTH)),
    "finetune of PixArt": Trial("pixart_alpha", "finetune", ("sample.steps=2",)),
    "lora of Cascade": Trial("stable_cascade", "lora", (DROPOUT,), side=128),
}
