"""The PyTorch reference's training step, for `bench`: HF's LLaVA with random weights, AdamW and clipping, eager.

It runs as its users run it: labels in, so that the head works at every position, and the whole vision tower. On a GPU
16-bit compute is autocast over float32 weights, which is what the port's cast of its master weights amounts to.
"""

import os
import time

# Threads that spin while they wait would slow the port, which takes turns with this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from medcg_jax.models.llava import LlavaConfig
from medcg_jax.run_config import ConfigError, ModelConfig, TrainConfig
from medcg_jax.weights.llava import config_to_json

try:
    import torch
    import transformers
except ImportError as error:
    raise ConfigError(f"--against=torch: {error}; pip install 'medcg-jax[parity]' has it") from None

# Name of a part here -> HF's module.
PARTS = {"vision": "vision_tower", "projector": "multi_modal_projector", "decoder": "language_model"}


class Reference:
    """HF's model with the port's architecture, batch and optimizer; `seconds(steps)` trains it."""

    def __init__(self, config: LlavaConfig, batch: dict[str, np.ndarray], train: TrainConfig, model: ModelConfig):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, model.compute_dtype)
        torch.manual_seed(0)
        described = transformers.LlavaConfig.from_dict(config_to_json(config, "float32"))
        with self.device:
            self.model = transformers.LlavaForConditionalGeneration(described)
        for name, module in PARTS.items():
            getattr(self.model.model, module).requires_grad_(name in model.trainable)
        self.model.lm_head.requires_grad_("decoder" in model.trainable)
        self.model.train()
        if model.remat != "none":
            self.model.gradient_checkpointing_enable()
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=train.learning_rate, betas=(train.b1, train.b2), eps=train.eps,
            weight_decay=train.weight_decay,
        )  # fmt: skip
        self.clip_norm, self.parts = train.clip_norm, train.accumulation_steps
        self.inputs = {name: value.to(self.device) for name, value in hf_inputs(config, batch).items()}

    def seconds(self, steps: int) -> float:
        """Seconds that `steps` steps took, the last one finished."""
        began = time.perf_counter()
        for _ in range(steps):
            self._step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            pieces = {name: value.chunk(self.parts) for name, value in self.inputs.items()}
            for i in range(self.parts):
                loss = self.model(**{name: piece[i] for name, piece in pieces.items()}).loss
                (loss / self.parts).backward()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.weights, self.clip_norm)
        self.optimizer.step()


def hf_inputs(config: LlavaConfig, batch: dict[str, np.ndarray]) -> dict:
    """The batch as the arguments of HF's forward: pixels normalised, labels -100 where nothing is supervised."""
    mean, std = np.float32(config.vision.image_mean), np.float32(config.vision.image_std)
    pixels = (batch["pixels"][:, 0].astype(np.float32) / 255 - mean) / std
    labels = np.full(batch["tokens"].shape, -100)
    rows, columns = np.nonzero(batch["target_weights"])
    labels[rows, batch["target_positions"][rows, columns] + 1] = batch["targets"][rows, columns]
    return {
        "input_ids": torch.from_numpy(batch["tokens"]).long(),
        "attention_mask": torch.from_numpy(batch["segment_ids"]).long(),
        "pixel_values": torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()),
        "labels": torch.from_numpy(labels),
    }
