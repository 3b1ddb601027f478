"""C sources of this folder as functions: compiled for this processor where they are first asked for, and kept.

The compiler is `$CC`, cc, gcc or clang; a source takes it about a second. What it makes is kept in `$XDG_CACHE_HOME/ldm`
(~/.cache/ldm), under a name that has the sources, the compiler and the processor in it; where that cannot be written, or
others can write there, it is made anew by each process. Where there is no compiler, or none that will do, there is no library,
and torch's own kernels do the work.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fPIC")
SECONDS = 60  # for a compiler to be done


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """`name`.c of this folder, compiled and loaded; None where that cannot be."""
    source = Path(__file__).with_name(f"{name}.c")
    asked = os.environ.get("CC", "").strip()
    for command in [asked] if asked else COMPILERS:
        try:
            compiler = shlex.split(command)
            if shutil.which(compiler[0]):
                return _loaded(source, compiler)
        except (OSError, ValueError, subprocess.SubprocessError):  # no command, not compiled, or not to be loaded
            continue
    return None


def _loaded(source: Path, compiler: list[str]) -> ctypes.CDLL:
    folder = _folder()
    kept = folder and folder / f"{source.stem}-{_key(source, compiler)}.so"
    if kept and kept.is_file():
        return _opened(kept)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / source.stem
        _run(*compiler, *FLAGS, "-c", str(source), "-o", f"{made}.o")
        # Linked without an OpenMP library: its functions are those of the one that torch has loaded, so that both have the same
        # threads.
        _run(*compiler, "-shared", f"{made}.o", "-lm", "-o", f"{made}.so")
        if kept:
            os.replace(f"{made}.so", kept)
        return _opened(kept or Path(f"{made}.so"))


def _opened(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)


def _folder() -> Path | None:
    """Where libraries are kept, which nobody else may write to; None where there is no such place."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldm"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except (OSError, RuntimeError):  # no home
        return None
    own = found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if own and os.access(folder, os.W_OK) else None


def _key(source: Path, compiler: list[str]) -> str:
    sources = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    what = (*sources, *FLAGS, *compiler, _run(*compiler, "--version"), _processor())
    return hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]


def _processor() -> str:
    """What instructions it has, so that a home folder may be shared by several."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout
