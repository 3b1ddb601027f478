"""From the name of an adapter to its file: a path, or a name to be looked up in a folder."""

from pathlib import Path

from weights_convert import CheckpointError

ENDINGS = (".safetensors", ".pt", ".bin", ".ckpt", ".pth")


def find(name: str, folder: str | Path | None, what: str) -> Path:
    """The file that `name` names: a path where there is one, or a file in `folder`, with its ending or without. what: a "LoRA".

    A folder is taken, since diffusers and PEFT write such, but not for a bare name that is a file's too: pictures called
    `style` may lie beside the `style.safetensors` that learned from them.
    Raises CheckpointError, which says where it was looked for, and what there is.
    """
    path = Path(name).expanduser()
    if _exists(path) and (folder is None or path.is_file() or path.name != name):
        return path
    if folder is None:
        raise CheckpointError(f"{what} {name!r}: there is no such file; give its path, or the folder it is in (adapter_folder)")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{what} {name!r}: adapter_folder {str(folder)!r} is no folder; name the one it is in")
    inside = Path(path.name)  # of a path from elsewhere, its last part; so no name leads out of the folder
    candidates = [folder / inside, *(folder / f"{inside}{ending}" for ending in ENDINGS), path]
    for candidate in sorted(filter(_exists, candidates if inside.name else []), key=lambda found: not found.is_file()):
        return candidate
    known = sorted(file.stem for file in folder.iterdir() if file.suffix in ENDINGS)
    listed = f"; it has {', '.join(known[:10])}{', ...' if len(known) > 10 else ''}" if known else ", nor any other"
    raise CheckpointError(f"{what} {name!r}: there is no such file in {folder}{listed}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system is none of its files
        return False
