"""`python -m medcg_jax VERB` is `medcg VERB`."""

from medcg_jax.cli import run

if __name__ == "__main__":
    run()
