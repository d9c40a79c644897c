"""The PyTorch reference, for `bench`: HF's LLaVA with random weights, trained, asked for letters, and generating.

It runs as its users run it: rows padded to the longest of the batch, as HF's processor does; labels passed in, so that
the head works at every position; the whole vision tower, without gradients; AdamW as HF's Trainer has it by default
(fused), a constant learning rate and clipping. 16-bit training on a GPU is autocast over float32 weights, the equivalent
of the port's cast of its master weights; for inference the weights have the 16-bit dtype.
"""

import importlib.util
import logging
import os
import time
from collections.abc import Callable

# Threads that spin while they wait would slow the port, which takes turns with the reference.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from medcg_jax.bench.steps import HF_BATCH
from medcg_jax.config import ConfigError, ModelConfig, TrainConfig
from medcg_jax.families.flops import forward, training, vit
from medcg_jax.families.llava.model import LlavaConfig
from medcg_jax.families.weights.llava import config_to_json
from medcg_jax.terminal import install

try:
    import torch
    import transformers
except ImportError as error:
    raise ConfigError(f"--against=torch: {error}; {install('parity')} brings it") from None

# Submodule of the port -> HF's module.
PARTS = {"vision": "vision_tower", "projector": "multi_modal_projector", "decoder": "language_model"}


def attentions() -> tuple[str, ...]:
    """HF's names of the attentions to compare with: SDPA, and FlashAttention on a GPU where its package is installed."""
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
    return ("sdpa", "flash_attention_2") if flash else ("sdpa",)


class Reference:
    """HF's model with the port's architecture, batch and optimizer; `seconds(steps)` trains it.

    `compiled_seconds(steps)` trains the same weights by `torch.compile`, which compiles at the first call.
    attention: one of `attentions`.
    """

    def __init__(
        self, config: LlavaConfig, batch: dict[str, np.ndarray], train: TrainConfig, model: ModelConfig,
        *, attention: str = "sdpa",
    ):  # fmt: skip
        self.device = here()
        self.dtype = getattr(torch, model.compute_dtype)
        self.model = new_model(config, torch.float32, attention)
        for name, module in PARTS.items():
            getattr(self.model.model, module).requires_grad_(name in model.trainable)
        self.model.lm_head.requires_grad_("decoder" in model.trainable)
        self.model.train()
        if model.remat != "none":
            self.model.gradient_checkpointing_enable()
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=train.learning_rate, betas=(train.b1, train.b2), eps=train.eps,
            weight_decay=train.weight_decay, fused=True,
        )  # fmt: skip
        self.clip_norm, self.parts = train.clip_norm, train.accumulation_steps
        self.inputs = {name: value.to(self.device) for name, value in hf_inputs(config, batch).items()}
        # Hides a page of warnings about graph breaks in transformers.
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        self.compiled = torch.compile(self.model, dynamic=False)

    def seconds(self, steps: int) -> float:
        """Seconds that `steps` steps took, the last one finished."""
        return self._seconds(steps, self.model)

    def compiled_seconds(self, steps: int) -> float:
        return self._seconds(steps, self.compiled)

    def work(self) -> dict[str, int]:
        """Counts to compare with the port's: `rows`, real `tokens`, supervised `targets`, `trained` parameters."""
        return {
            "rows": len(self.inputs["input_ids"]),
            "tokens": int(self.inputs["attention_mask"].sum()),
            "targets": int((self.inputs["labels"] != -100).sum()),
            "trained": sum(weight.numel() for weight in self.weights),
        }

    def _seconds(self, steps: int, call: Callable) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            self._step(call)
        finish()
        return time.perf_counter() - began

    def _step(self, call: Callable) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            pieces = {name: value.chunk(self.parts) for name, value in self.inputs.items()}
            for i in range(self.parts):
                loss = call(**{name: piece[i] for name, piece in pieces.items()}).loss
                (loss / self.parts).backward()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.weights, self.clip_norm)
        self.optimizer.step()


class Answers:
    """HF's model answers test rows (`encode_eval`'s keys) in batches of `HF_BATCH`; a step is all rows.

    `forward(steps)` sets `logprobs`, float32[N, K] log-probabilities of the letters at the last real position of
    `model(**inputs).logits`. `generate(steps)` sets `generated`, int[N, num_new] greedy tokens without an early stop.
    Inputs are put on the device beforehand.
    """

    def __init__(self, config: LlavaConfig, rows: dict[str, np.ndarray], model: ModelConfig, *, num_new: int):
        self.device, self.num_new = here(), num_new
        dtype = getattr(torch, model.compute_dtype)
        self.model = new_model(config, dtype, "sdpa").eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = config.pad_token_id
        self.num_rows = len(rows["tokens"])
        self.chunks = []
        for start in range(0, self.num_rows, HF_BATCH):
            chunk = {key: value[start : start + HF_BATCH] for key, value in rows.items()}
            right, left = (answer_inputs(config, chunk, side, dtype, self.device) for side in ("right", "left"))
            options = torch.from_numpy(chunk["option_ids"]).long().to(self.device)
            last = torch.from_numpy(chunk["last_position"]).long().to(self.device)
            self.chunks.append((right, left, last, options))

    @torch.inference_mode()
    def forward(self, steps: int) -> None:
        for _ in range(steps):
            logprobs = []
            for inputs, _, last, options in self.chunks:
                logits = self.model(**inputs).logits
                at_end = logits[torch.arange(len(last), device=self.device), last].float()
                logprobs.append(torch.log_softmax(at_end, -1).gather(1, options.clamp(min=0)))
            self.logprobs = torch.cat(logprobs).cpu().numpy()

    @torch.inference_mode()
    def generate(self, steps: int) -> None:
        for _ in range(steps):
            generated = []
            for _, inputs, _, _ in self.chunks:
                tokens = self.model.generate(**inputs, max_new_tokens=self.num_new, do_sample=False)
                generated.append(tokens[:, inputs["input_ids"].shape[1] :])
            self.generated = torch.cat(generated).cpu().numpy()


def here() -> "torch.device":
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_memory() -> None:
    """Frees unused GPU memory and resets the peak."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def new_model(config: LlavaConfig, dtype, attention: str):
    """HF's model of this architecture with random weights, on the device."""
    torch.manual_seed(0)
    described = transformers.LlavaConfig.from_dict(config_to_json(config, "float32"))
    with here():
        return transformers.AutoModelForImageTextToText.from_config(
            described, dtype=dtype, attn_implementation=attention
        )


def peak_bytes() -> int | None:
    """Peak bytes of PyTorch on the GPU so far; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def hf_inputs(config: LlavaConfig, batch: dict[str, np.ndarray]) -> dict:
    """A training batch as the arguments of HF's forward: normalised pixels, labels -100 where nothing is supervised, no
    columns of only padding."""
    longest = int(batch["segment_ids"].sum(axis=1).max())
    labels = np.full(batch["tokens"].shape, -100)
    rows, columns = np.nonzero(batch["target_weights"])
    labels[rows, batch["target_positions"][rows, columns] + 1] = batch["targets"][rows, columns]
    return {
        "input_ids": torch.from_numpy(batch["tokens"][:, :longest]).long(),
        "attention_mask": torch.from_numpy(batch["segment_ids"][:, :longest]).long(),
        "pixel_values": normalised(config, batch["pixels"]),
        "labels": torch.from_numpy(labels[:, :longest]),
    }


def answer_inputs(config: LlavaConfig, batch: dict[str, np.ndarray], side: str, dtype, device) -> dict:
    """Test rows as the arguments of HF's forward, padded to the longest at the right, or at the left for `generate`."""
    lengths = batch["segment_ids"].sum(axis=1)
    longest = int(lengths.max())
    tokens, mask = (batch[key][:, :longest].copy() for key in ("tokens", "segment_ids"))
    if side == "left":
        for i, length in enumerate(lengths):
            tokens[i], mask[i] = np.roll(tokens[i], longest - length), np.roll(mask[i], longest - length)
    return {
        "input_ids": torch.from_numpy(tokens).long().to(device),
        "attention_mask": torch.from_numpy(mask).long().to(device),
        "pixel_values": normalised(config, batch["pixels"]).to(device, dtype),
    }


def normalised(config: LlavaConfig, pixels: np.ndarray) -> "torch.Tensor":
    """float32[B, 3, h, w] of uint8[B, 1, h, w, 3], as CLIP's processor has it."""
    mean, std = np.float32(config.vision.image_mean), np.float32(config.vision.image_std)
    return torch.from_numpy(((pixels[:, 0].astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2).copy())


def executed(config: LlavaConfig, rows: int, length: int, trainable: tuple[str, ...] = ()) -> float:
    """FLOPs that HF executes on `rows` rows of `length` tokens: a training step, or a forward pass where nothing trains.

    Our formulas, plus what HF computes and the model does not need: logits at every position, and the tower's layers
    above the one whose features are taken. Minus the gradient of the first trained product's input, which autograd
    skips. Equal to `torch.utils.flop_counter` (a test) with attention "eager"; fused kernels recompute attention's
    products in the backward pass, which is not counted.
    """
    per_row, vision = forward(config, length=length), config.vision
    unused = vit(vision.num_layers - vision.num_run_layers, vision.embed_dim, vision.mlp_dim, vision.num_patches + 1)
    if not trainable:
        return rows * (per_row.total + unused)
    spared = 0.0
    if "vision" in trainable:
        spared = 2.0 * vision.num_patches * 3 * vision.patch_size_px**2 * vision.embed_dim
    elif "projector" in trainable:
        spared = 2.0 * vision.num_patches * vision.embed_dim * config.text.embed_dim
    return rows * (training(per_row, trainable=trainable) + unused - spared)
