"""The parts of a model by name, blocks as well as layers: what another implementation calls what ours computes.

The tables say where each parameter is; a layer is named by its parameters, and a block by all the parameters below it. So two
blocks are the same block where the same parameters are below both.
"""

from collections.abc import Iterable, Mapping

from weights_convert.architecture import Architecture
from weights_convert.naming import bijection


def module_paths(architecture: Architecture, naming: str, called: Iterable[str]) -> dict[str, str]:
    """Foreign path -> native path, of all parts that both have.

    called: the foreign paths of parts that are called; lists of parts, which are not, are left out of it.
    """
    layers = {}  # foreign -> native, of what has parameters of its own
    for entry in bijection(architecture, naming):
        foreign, native = (name.rpartition(".")[0] for name in (entry.foreign, entry.native))
        layers[foreign] = native if layers.get(foreign, native) == native else None  # one tensor holds several of ours
    layers = {foreign: native for foreign, native in layers.items() if native is not None}
    called = set(called)
    theirs = _blocks({foreign: foreign for foreign in layers}, lambda path: path in called)
    natives = _blocks(layers, lambda path: not _is_list(path, layers.values()))
    found = {foreign: native for foreign, native in layers.items() if foreign in called}
    for below, paths in theirs.items():
        found |= dict(zip(paths, natives.get(below, ()), strict=False))
    return found


def _blocks(layers: Mapping[str, str], is_called) -> dict[frozenset[str], list[str]]:
    """By the layers below them, named by `layers`' keys: the paths of blocks, innermost first."""
    below: dict[str, set[str]] = {}
    for layer, path in layers.items():
        while path:
            path = path.rpartition(".")[0]
            below.setdefault(path, set()).add(layer)
    blocks: dict[frozenset[str], list[str]] = {}
    for path in sorted(below, key=len, reverse=True):
        if path and is_called(path):
            blocks.setdefault(frozenset(below[path]), []).append(path)
    return blocks


def _is_list(path: str, layers: Iterable[str]) -> bool:
    """Whether a native path is of a list of parts: all that follows it are numbers."""
    return all(layer.removeprefix(f"{path}.").split(".")[0].isdigit() for layer in layers if layer.startswith(f"{path}."))
