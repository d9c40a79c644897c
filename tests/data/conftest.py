"""The configuration that the data tests share."""

import pytest

from medcg_jax.config import DataConfig


@pytest.fixture(scope="session")
def plain_config() -> DataConfig:
    return DataConfig(system_prompt="", max_text_tokens=40, max_target_tokens=6)
