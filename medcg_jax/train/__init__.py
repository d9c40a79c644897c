"""Step, optimizer, losses, loop, checkpoint and log; `medcg_jax.train(config)` is `medcg train` (`run.train_config`).

Importing any module of a package sets the package as an attribute of its parent. So the name `medcg_jax.train` is this
package, and the package itself can be called.
"""

import sys
from types import ModuleType


class _CallablePackage(ModuleType):
    def __call__(self, config, workdir="") -> dict:
        """As `medcg_jax.train.run.train_config`."""
        from medcg_jax.train.run import train_config

        return train_config(config, workdir)


sys.modules[__name__].__class__ = _CallablePackage
