"""Networks in ONNX files, run by onnxruntime."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch

from otl.config import SettingsError

log = logging.getLogger(__name__)


class Onnx:
    """A network with one input that counts.

    Args:
        key: the setting that names it, for messages.
        file: of the network.
        device: where it runs, if this onnxruntime can.

    Raises:
        SettingsError: onnxruntime is not installed, or cannot read the file.
    """

    def __init__(self, key: str, file: Path, device: torch.device) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise SettingsError(f"{key}: ONNX files need onnxruntime: pip install 'otl[tools]'") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda":
            if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
                providers.insert(0, "CUDAExecutionProvider")
            else:
                log.warning("this onnxruntime has no CUDA, so the CPU is used: onnxruntime-gpu in its place has")
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers)
        except Exception as error:  # onnxruntime's own classes have no other base in common
            raise SettingsError(f"{key}: {file} is no ONNX network that can be run ({str(error)[:200]})") from error
        self.takes: list[int | str | None] = self.session.get_inputs()[0].shape  # no number where any will do
        self.gives: list[int | str | None] = self.session.get_outputs()[0].shape

    def run(self, rows: list[np.ndarray]) -> np.ndarray:
        """The first output for each row: at once, where the network takes any number."""
        name = self.session.get_inputs()[0].name
        batches = [row[None] for row in rows] if isinstance(self.takes[0], int) else [np.stack(rows)]
        return np.concatenate([self.session.run(None, {name: batch})[0] for batch in batches])
