"""Which packages a wheel holds: all of medcg_jax, and the config files, which lie beside it in a checkout."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["medcg_jax*"]), "medcg_jax.configs"], package_dir={"medcg_jax.configs": "configs"}
)
