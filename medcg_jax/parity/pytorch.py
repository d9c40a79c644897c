"""The PyTorch side of `medcg parity`: HF's model from a directory, its stages, gradients and AdamW steps.

Imports torch and transformers when called, never before.
"""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np

from medcg_jax.families import registry
from medcg_jax.families.build import Config
from medcg_jax.families.weights.convert import read_config
from medcg_jax.families.weights.files import WeightsError
from medcg_jax.terminal import install


class Reference:
    """HF's model in float32 with eager attention; takes and returns numpy arrays.

    family: the family's module in `verb.FAMILIES`; its `taps` say where the stages are.
    """

    def __init__(self, model, family: ModuleType):
        import torch

        self.torch, self._family = torch, family
        self._canonical = registry.family(family.FAMILY).weight_map.canonical
        self.model = model.float().eval()

    def tensors(self) -> dict[str, np.ndarray]:
        """Canonical name -> copy of every parameter."""
        return {self._canonical(name): p.detach().numpy().copy() for name, p in self.model.named_parameters()}

    def put(self, tensors: dict[str, np.ndarray]) -> None:
        """Sets every parameter from `tensors` (canonical name -> array)."""
        with self.torch.no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(self.torch.from_numpy(tensors[self._canonical(name)]))

    def logits(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """float32[B, T, V]; inputs: HF's forward arguments."""
        with self.torch.no_grad():
            return self.model(**self._inputs(inputs)).logits.numpy()

    def _inputs(self, inputs: dict[str, np.ndarray]) -> dict:
        return {name: self.torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}

    def stages(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by stage, named as the port's (`parity.port_stages`); inputs: HF's forward arguments."""
        stages, handles = {}, []

        def tap(name, module, *, of_input):
            def hook(_, args, kwargs, out):
                value = (args[0] if args else kwargs["hidden_states"]) if of_input else out
                stages[name] = (value[0] if isinstance(value, tuple) else value).detach().numpy().copy()

            handles.append(module.register_forward_hook(hook, with_kwargs=True))

        for name, module, of_input in self._family.taps(self.model):
            tap(name, module, of_input=of_input)
        try:
            with self.torch.no_grad():
                out = self.model(**self._inputs(inputs))
        finally:
            for handle in handles:
                handle.remove()
        stages["logits"] = out.logits.numpy()
        if out.loss is not None:
            stages["loss"] = out.loss.numpy()
        return stages

    def gradients(self, inputs: dict[str, np.ndarray], prefixes: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Gradient of the loss by canonical name, for parameters whose canonical name starts with one of `prefixes`."""
        self._train_only(prefixes)
        self.model.zero_grad()
        self.model(**self._inputs(inputs)).loss.backward()
        # torch leaves None as the gradient of a parameter that the loss does not depend on.
        grads = {name: p.grad if p.grad is not None else self.torch.zeros_like(p) for name, p in self._trained()}
        return {name: grad.numpy().copy() for name, grad in grads.items()}

    def steps(
        self, inputs, prefixes: tuple[str, ...], *, num_steps: int, learning_rate: float, eps: float = 1e-8
    ) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
        """(loss, trained tensors by canonical name) before each of `num_steps` steps of torch's AdamW.

        Weight decay is 0. The tensors are copies.
        """
        self._train_only(prefixes)
        given = self._inputs(inputs)
        optimizer = self.torch.optim.AdamW([p for _, p in self._trained()], lr=learning_rate, eps=eps, weight_decay=0.0)
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = self.model(**given).loss
            loss.backward()
            yield loss.item(), {name: p.detach().numpy().copy() for name, p in self._trained()}
            optimizer.step()

    def nudged(self, seed: int = 0) -> dict[str, np.ndarray]:
        """The parameters by canonical name, each number randomly moved by about its last bit, up, down or not."""
        rng = np.random.default_rng(seed)
        return {
            name: value * (1 + np.float32(2**-23) * rng.integers(-1, 2, value.shape)).astype(np.float32)
            for name, value in self.tensors().items()
        }

    def _train_only(self, prefixes) -> None:
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._canonical(name).startswith(prefixes))

    def _trained(self):
        return [(self._canonical(name), p) for name, p in self.model.named_parameters() if p.requires_grad]


def open_reference(src: Path, family: ModuleType, config: Config | None = None) -> Reference:
    """HF's model from a directory in an HF layout; family: as in `Reference`.

    config: the config that this port runs (`family.runnable`); None: the one of `src`.

    Raises:
      WeightsError: PyTorch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise WeightsError(
            f"parity with PyTorch needs torch and transformers ({error}): {install('parity')} brings them, or compare "
            "with recorded numbers by --inputs=FILE.npz"
        ) from error
    load = getattr(transformers, family.HF_CLASS).from_pretrained
    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    try:
        model = load(src, **options)
        family.prepare(model, family.runnable(read_config(src))[0] if config is None else config)
        return Reference(model, family)
    # transformers raises many kinds: a missing package for quantisation, sizes that differ.
    except (ValueError, ImportError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"transformers cannot open {src}: {type(error).__name__}: {str(error)[:300]}") from error
