"""Samplers: from noise to data, one a file, each a pure function

    sample(model, x, grid, *, noise, after_step) -> x

over the steps of a grid (`ldm/diffusion/grid.py`), which carries the noise levels, so that none needs the schedule. A file
states its NAME, the SPELLINGS users know it by, its PAPER, its ORDER of convergence (of a whole run, its
start included), whether it draws noise (STOCHASTIC), and
`calls(grid)`, how often it asks the network. A new file here is found, and tested, with nothing to register.
"""

import pkgutil
from functools import lru_cache
from importlib import import_module
from types import ModuleType


@lru_cache(maxsize=1)
def all_samplers() -> dict[str, ModuleType]:
    """Every sampler by its NAME."""
    modules = [import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {module.NAME: module for module in modules}


def find(spelling: str) -> ModuleType:
    """The sampler that users call `spelling`. Case, spaces, dashes and underscores do not matter; "+" does.

    Raises ValueError naming every sampler.
    """
    wanted = plain(spelling)
    for module in all_samplers().values():
        if wanted in map(plain, (module.NAME, *module.SPELLINGS)):
            return module
    raise ValueError(f"sampler {spelling!r}; expected one of {', '.join(sorted(all_samplers()))}")


def plain(spelling: str) -> str:
    """What `find` compares."""
    return "".join(c for c in spelling.lower() if c not in " -_")
