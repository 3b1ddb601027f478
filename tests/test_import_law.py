"""The house: each floor of `ldm` imports only from floors below it, and `import ldm` costs nothing until used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. A floor may import itself and what stands before it, unless listed below.
FLOORS = (
    *("ldm.assets", "ldm.images", "ldm.processes", "ldm.diffusion", "ldm.text", "ldm.models", "ldm.scenes", "ldm.presets"),
    "ldm.checkpoint",
    *("ldm.samplers", "ldm.output", "ldm.adapters", "ldm.fast", "ldm.pipelines", "ldm.training", "ldm.numerics"),
    *("ldm.evaluation", "ldm.web", "ldm.cli", "ldm.__main__"),
)
GROUND = {"ldm.images", "ldm.diffusion", "ldm.text", "ldm.models", "ldm.assets"}
ONLY = {"ldm.samplers": {"ldm.diffusion"}}  # floors that may import less than everything below
NEVER = {
    "ldm.training": {"ldm.pipelines"},
    "ldm.evaluation": {"ldm.training"},
    "ldm.numerics": {"ldm.training"},
}
MODULES = sorted([*(ROOT / "ldm").rglob("*.py"), *(ROOT / "weights_convert").rglob("*.py")])


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Every module of this project that the file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name.split(".")[0] in ("ldm", "weights_convert")}


def floor_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_floors_below_it(path):
    floor = floor_of(name_of(path))
    imported = imports_of(path)
    if floor.startswith("weights_convert"):
        assert not {name for name in imported if name.split(".")[0] == "ldm"}
        return
    if floor == "ldm":  # the package itself looks everything up late
        assert not imported
        return
    assert floor in FLOORS, f"{floor} has no place in the house: add it to FLOORS"
    if floor in GROUND:
        allowed = {floor}
    elif floor in ONLY:
        allowed = ONLY[floor]
    else:
        allowed = {*FLOORS[: FLOORS.index(floor) + 1], "weights_convert"} - NEVER.get(floor, set())
    for name in imported:
        home = "weights_convert" if name.startswith("weights_convert") else floor_of(name)
        same_sampler = floor == "ldm.samplers" and name.startswith(name_of(path))
        assert home in allowed or home == "ldm" or same_sampler, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("statement", ["import ldm", "import weights_convert, weights_convert.__main__"])
def test_importing_brings_in_no_torch_and_no_numpy(statement):
    code = f"{statement}; import sys; print(*[m for m in ('torch', 'numpy', 'safetensors', 'tokenizers') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == ""


def test_the_package_offers_what_it_lists():
    import ldm

    for name in ldm.__all__:
        assert getattr(ldm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = ldm.lode


def test_the_law_has_something_to_hold():
    assert len(MODULES) > 20
    assert imports_of(ROOT / "ldm" / "checkpoint.py") >= {"ldm.models.unet", "weights_convert"}
