"""Picture files: a PNG that carries its receipt, written whole or not at all, and never over another."""

import io
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, PngImagePlugin

from ldm.output import receipt as receipts

KEY = "ldm"  # of the PNG text that holds the receipt
NUMBERED = re.compile(r"(\d{5,})(-.*)?\.png")


def save(image: Image.Image, receipt: Mapping[str, Any], folder: str | Path) -> Path:
    """Write the picture into `folder` under the next free number and its seed, as in 00007-1234.png, and return the path."""
    folder = Path(folder)
    with _uninterrupted(), _Partial(image, receipt, folder) as partial:
        number = _next_number(folder)
        while True:
            path = folder / f"{number:05}-{receipt['seed']}.png"
            try:
                os.link(partial, path)  # unlike a renaming, this fails where the name is taken
                return path
            except FileExistsError:
                number += 1
            except OSError:  # a file system without links
                if _renamed(partial, path):
                    return path
                number += 1


def save_as(image: Image.Image, receipt: Mapping[str, Any] | None, path: str | Path) -> Path:
    """Write the picture under this very name, over what was there; without a receipt where there is none yet."""
    path = Path(path)
    with _uninterrupted(), _Partial(image, receipt, path.parent) as partial:
        os.replace(partial, path)
    return path


def png(image: Image.Image, receipt: Mapping[str, Any]) -> bytes:
    """The file that `save` writes, for those who put it somewhere else."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=_info(receipt))
    return buffer.getvalue()


def _info(receipt: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    if receipt is not None:
        text = receipts.parameters(receipt).replace("\0", "")
        info.add_text("parameters", text.encode(errors="replace").decode())  # a model's name may hold half characters
        info.add_text(KEY, receipts.to_json(receipt))
    return info


def texts(path: str | Path | BinaryIO, formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP")) -> dict[str, str]:
    """The texts that a picture file carries, by their keys. Raises ValueError where it is no picture of these formats."""
    try:
        with Image.open(path, formats=formats) as image:
            image.load()  # text may stand behind the pixels
            return {key: text for key, text in image.info.items() if isinstance(key, str) and isinstance(text, str)}
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: cannot be read as {' or '.join(formats)} ({reason})") from None


def read_receipt(path: str | Path) -> dict[str, Any]:
    """The receipt that a PNG carries. Raises ValueError, one line, where there is none."""
    text = texts(path, ("PNG",)).get(KEY)
    if text is None:
        raise ValueError(f"{path}: carries no receipt; expected a PNG written by ldm and not saved anew by another program")
    return receipts.from_json(text, str(path))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the file is whole and its hidden name gone: Python lets them in anywhere, also between
    making a file and taking note of it."""
    if threading.current_thread() is not threading.main_thread():  # where signals are not delivered, nor may be held up
        yield
        return
    waiting = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in before.items() if handler is not None}
    for number in held:
        signal.signal(number, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number, frame in waiting:
            if callable(held[number]):
                held[number](number, frame)
            else:
                signal.raise_signal(number)


class _Partial:
    """A whole file under a hidden name in the folder where it will stand, gone again on leaving."""

    def __init__(self, image: Image.Image, receipt: Mapping[str, Any] | None, folder: Path):
        self.image, self.folder, self.info = image, folder, _info(receipt)

    def __enter__(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, self.name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".partial")
        try:
            with os.fdopen(handle, "wb") as file:
                self.image.save(file, format="PNG", pnginfo=self.info)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(self.name, 0o666 & ~_umask())
        except BaseException:
            self.__exit__()
            raise
        return self.name

    def __exit__(self, *_: object) -> None:
        if os.path.exists(self.name):
            os.unlink(self.name)


def _renamed(partial: str, path: Path) -> bool:
    """The same where there are no links: an empty file takes the name first. False where another has it."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    try:
        os.replace(partial, path)
    except OSError:
        path.unlink()
        raise
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _next_number(folder: Path) -> int:
    taken = [int(found.group(1)) for name in os.listdir(folder) if (found := NUMBERED.fullmatch(name))]
    return max(taken, default=-1) + 1
