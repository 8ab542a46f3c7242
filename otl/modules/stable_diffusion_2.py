"""Stable Diffusion 2.0 and 2.1."""

from __future__ import annotations

from otl.formats import single_file
from otl.modules.stable_diffusion import StableDiffusion


class StableDiffusion2(StableDiffusion):
    """Stable Diffusion 1.5's networks led by OpenCLIP-H: its last layer but one, which the published text encoder ends
    with (23 layers), after the final layer norm. The 768-pixel models predict v, which a single file
    does not say: `config` does ("sd20", "sd21": v; "sd20_base", "sd21_base", "sd20_inpaint": epsilon).

    A dropped caption is the empty one, as in the original code (github.com/Stability-AI/stablediffusion,
    `ucg_training` in ldm/models/diffusion/ddpm.py); OneTrainer multiplies what the text encoder gives by 0 instead.
    """

    resolution = 768
    config_name = "sd21"
    file_keys = (*StableDiffusion.file_keys, "cond_stage_model.model.transformer.resblocks.22.ln_1.weight")
    foreign_keys = ()
    file_texts = {"text_encoder": (single_file.OPEN_CLIP, "cond_stage_model.model")}
    inpaint_architecture = "stable-diffusion-v2-inpainting"

    @property
    def architecture(self) -> str:  # type: ignore[override]
        """ModelSpec tells the two kinds apart."""
        return "stable-diffusion-v2-768-v" if self.predicts_v else "stable-diffusion-v2-512"

    @property
    def base_model_version(self) -> str:  # type: ignore[override]
        return "sd_v2_v" if self.predicts_v else "sd_v2"

    @property
    def predicts_v(self) -> bool:
        return self.noise_schedule.prediction == "v_prediction"
