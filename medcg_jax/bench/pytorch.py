"""The PyTorch reference, for `bench`: a family's model with random weights, trained, asked for letters, and generating.

It runs as its users run it: rows padded to the longest of the batch, as HF's processor does; labels passed in, so that
the head works at every position; the whole vision tower, without gradients; AdamW as HF's Trainer has it by default
(fused), a constant learning rate and clipping. 16-bit training on a GPU is autocast over float32 weights, the equivalent
of the port's cast of its master weights; for inference the weights have the 16-bit dtype.
"""

import importlib.util
import logging
import os
import time
from collections.abc import Callable, Sequence

# Threads that spin while they wait would slow the port, which takes turns with the reference.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from medcg_jax.bench.steps import HF_BATCH
from medcg_jax.config import ConfigError, ModelConfig, TrainConfig
from medcg_jax.families.common import FamilyConfig
from medcg_jax.terminal import install

try:
    import torch

    from medcg_jax.bench import pytorch_families as families
except ImportError as error:
    raise ConfigError(f"--against=torch: {error}; {install('parity')} brings it") from None


def attentions() -> tuple[str, ...]:
    """HF's names of the attentions to compare with: SDPA, and FlashAttention on a GPU where its package is installed."""
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn")
    return ("sdpa", "flash_attention_2") if flash else ("sdpa",)


class Reference:
    """The PyTorch model with the port's architecture, batch and optimizer; `seconds(steps)` trains it.

    `compiled_seconds(steps)` trains the same weights by `torch.compile`, which compiles at the first call.
    attention: one of `attentions`. `pieces` are the arguments of the model's forward, of one microbatch each.

    Raises:
      ConfigError: a trained part that the PyTorch model does not have.
    """

    def __init__(
        self, config: FamilyConfig, batch: dict[str, np.ndarray], train: TrainConfig, model: ModelConfig,
        *, attention: str = "sdpa",
    ):  # fmt: skip
        config, batch = families.inside_table(config, batch)
        self.device, self.config = here(), config
        self.dtype = getattr(torch, model.compute_dtype)
        self.model = new_model(config, torch.float32, attention)
        families.side_of(config).trained(self.model, config, model.trainable)
        self.model.train()
        if model.remat != "none":
            self.model.gradient_checkpointing_enable()
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.weights, lr=train.learning_rate, betas=(train.b1, train.b2), eps=train.eps,
            weight_decay=train.weight_decay, fused=True,
        )  # fmt: skip
        self.clip_norm, count = train.clip_norm, train.accumulation_steps
        batch = without_padding(batch)
        microbatches = [{name: value[i::count] for name, value in batch.items()} for i in range(count)]
        self.pieces = [on(self.device, training_inputs(config, microbatch)) for microbatch in microbatches]
        # Hides a page of warnings about graph breaks in transformers.
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        self.compiled = torch.compile(self.model, dynamic=False)

    @property
    def length(self) -> int:
        """Tokens of a padded row."""
        return self.pieces[0]["input_ids"].shape[1]

    def seconds(self, steps: int) -> float:
        """Seconds that `steps` steps took, the last one finished."""
        return self._seconds(steps, self.model)

    def compiled_seconds(self, steps: int) -> float:
        return self._seconds(steps, self.compiled)

    def work(self) -> dict[str, int]:
        """Counts to compare with the port's: `rows`, real `tokens`, `image_tokens`, numbers in the images (`pixels`),
        supervised `targets`, `boxes` of the text, `trained` parameters."""
        return read_by(self.config, self.pieces) | {
            "targets": sum(int((piece["labels"] != -100).sum()) for piece in self.pieces),
            "boxes": sum(int((piece["box_weights"] > 0).sum()) for piece in self.pieces if "box_weights" in piece),
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
            for piece in self.pieces:
                (call(**piece).loss / len(self.pieces)).backward()
        if self.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.weights, self.clip_norm)
        self.optimizer.step()


class Answers:
    """The PyTorch model answers test rows (`encode_eval`'s keys) in batches of `HF_BATCH`; a step is all rows.

    `forward(steps)` sets `logprobs`, float32[N, K] log-probabilities of the letters at the last real position of
    `model(**inputs).logits`. `generate(steps)` sets `generated`, int[N, num_new] greedy tokens without an early stop.
    Inputs are put on the device beforehand.
    """

    def __init__(self, config: FamilyConfig, rows: dict[str, np.ndarray], model: ModelConfig, *, num_new: int):
        config, rows = families.inside_table(config, rows)
        self.device, self.num_new = here(), num_new
        dtype = getattr(torch, model.compute_dtype)
        self.model = new_model(config, dtype, "sdpa").eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = config.pad_token_id
        self.config = config
        self.chunks = []
        for start in range(0, len(rows["tokens"]), HF_BATCH):
            chunk = {key: value[start : start + HF_BATCH] for key, value in rows.items()}
            right, left = (on(self.device, answer_inputs(config, chunk, side), dtype) for side in ("right", "left"))
            options = torch.from_numpy(chunk["option_ids"]).long().to(self.device)
            last = torch.from_numpy(chunk["last_position"]).long().to(self.device)
            self.chunks.append((right, left, last, options))

    def work(self) -> dict[str, int]:
        """Counts to compare with the port's."""
        return read_by(self.config, [right for right, *_ in self.chunks])

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


def read_by(config: FamilyConfig, inputs: Sequence[dict]) -> dict[str, int]:
    """{"rows", "tokens", "image_tokens", "pixels"} of the arguments of forward: rows, real tokens, image tokens,
    and numbers in the images."""
    frames = getattr(config.vision, "num_frames", 1)
    return {
        "rows": sum(len(given["input_ids"]) for given in inputs),
        "tokens": sum(int(given["attention_mask"].sum()) for given in inputs),
        "image_tokens": sum(int((given["input_ids"] == config.image_token_id).sum()) for given in inputs),
        "pixels": sum(given["pixel_values"].numel() for given in inputs) // frames,
    }


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


def new_model(config: FamilyConfig, dtype, attention: str):
    """The family's PyTorch model of this architecture with random weights, on the device."""
    torch.manual_seed(0)
    with here():
        return families.new_model(config, dtype, attention)


def on(device, inputs: dict, dtype=None) -> dict:
    """`inputs` on the device; the images in `dtype` where one is given."""
    placed = {name: value.to(device) for name, value in inputs.items()}
    return placed if dtype is None else placed | {"pixel_values": placed["pixel_values"].to(dtype)}


def peak_bytes() -> int | None:
    """Peak bytes of PyTorch on the GPU so far; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def without_padding(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The batch without the columns that are padding in every row, as HF's processor pads."""
    longest = int((batch["segment_ids"] != 0).sum(axis=1).max())
    return batch | {name: batch[name][:, :longest] for name in ("tokens", "segment_ids")}


def training_inputs(config: FamilyConfig, batch: dict[str, np.ndarray]) -> dict:
    """Training rows as the arguments of the PyTorch model's forward: labels -100 where nothing is supervised."""
    labels = np.full(batch["tokens"].shape, -100)
    rows, columns = np.nonzero(batch["target_weights"])
    labels[rows, batch["target_positions"][rows, columns] + 1] = batch["targets"][rows, columns]
    return text_inputs(config, batch, batch["tokens"], batch["segment_ids"]) | {"labels": torch.from_numpy(labels)}


def answer_inputs(config: FamilyConfig, batch: dict[str, np.ndarray], side: str) -> dict:
    """Test rows as the arguments of the PyTorch model's forward, padded to the longest at the right, or at the left for
    `generate`."""
    batch = without_padding(batch)
    tokens, mask = (batch[key].copy() for key in ("tokens", "segment_ids"))
    if side == "left":
        for i, length in enumerate(mask.sum(axis=1)):
            tokens[i], mask[i] = (np.roll(row, mask.shape[1] - length) for row in (tokens[i], mask[i]))
    return text_inputs(config, batch, tokens, mask)


def text_inputs(config: FamilyConfig, batch: dict[str, np.ndarray], tokens: np.ndarray, mask: np.ndarray) -> dict:
    """Ids, mask, and the images of the batch with what else the family takes."""
    text = {"input_ids": torch.from_numpy(tokens).long(), "attention_mask": torch.from_numpy(mask).long()}
    return text | families.side_of(config).images(config, batch, tokens)
