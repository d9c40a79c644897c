"""Metrics in Weights & Biases, where a run asks for it: the package is imported then, and not before."""

import importlib
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from medcg_jax.config import ConfigError
from medcg_jax.files import write_whole

FILE = "wandb.json"


@dataclass(frozen=True)
class WandbTarget:
    """Where a run's metrics go. `workdir` keeps the run's id, so that a restarted run goes on with the same one."""

    project: str
    name: str
    workdir: Path
    config: dict


def load_wandb():
    """The package.

    Raises:
      ConfigError: it is not installed, or lacks a package of its own.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"log.wandb is set and the package wandb cannot be imported ({error}): pip install 'medcg-jax[wandb]', or "
            "log.wandb='' is accepted"
        ) from error


class WandbLog:
    """One run there. WANDB_MODE=offline, which is wandb's own, keeps everything below the workdir for `wandb sync`."""

    def __init__(self, target: WandbTarget):
        wandb, self._path = load_wandb(), target.workdir / FILE
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            known = {"id": secrets.token_hex(4), "step": 0}
        self._id, self._step = known["id"], known["step"]
        self._keep()
        self._run = wandb.init(
            project=target.project, name=target.name, id=self._id, resume="allow", dir=str(target.workdir),
            config=target.config,
        )  # fmt: skip

    def write(self, metrics: dict) -> None:
        """Logs what is known of a step, once: what a restarted run does again is there already."""
        step = metrics["step"]
        if step <= self._step:
            return
        self._run.log({key: value for key, value in metrics.items() if key != "step" and value is not None}, step=step)
        self._step = step
        self._keep()

    def close(self) -> None:
        self._run.finish()

    def _keep(self) -> None:
        write_whole(self._path, json.dumps({"id": self._id, "step": self._step}) + "\n")
