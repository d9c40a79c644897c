"""Shared by the scripts: flags that change a configuration, and the JSON file of a script's figures."""

import json
from pathlib import Path

from medcg_jax.config import ConfigError
from medcg_jax.files import write_whole


def overrides(flags: list[str]) -> dict[str, str]:
    """{"a.b": "value"} of --config.a.b=value.

    Raises:
      ConfigError: another flag.
    """
    for flag in flags:
        if not flag.startswith("--config.") or "=" not in flag:
            raise ConfigError(f"{flag}: expected --config.KEY=VALUE")
    return dict(flag.removeprefix("--config.").split("=", 1) for flag in flags)


def write_record(path: str | Path, figures: dict) -> None:
    """Writes date, versions and `figures` as JSON; no file where `path` is ""."""
    if path:
        from medcg_jax.plan.topology import about_here  # which imports jax

        here = about_here()
        record = {"date": here["date"], "versions": here["versions"]} | figures
        write_whole(Path(path), json.dumps(record, indent=1) + "\n")
