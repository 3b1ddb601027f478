"""One run at a time in a folder."""

import os
from pathlib import Path

_OURS: set[str] = set()  # folders that this very process has claimed: it may claim them again


class Claim:
    """A folder in which no other process may begin a run until this is released, or this process has ended, however it did.

    It is a lock on the folder itself, which leaves nothing behind. Where there are none (Windows, some networks' file systems)
    nothing is guarded. The folder is made where it is missing. Raises ValueError, one line, where another run is at work.
    """

    def __init__(self, folder: str | Path):
        self._handle: int | None = None
        self._name = os.path.realpath(folder)
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:
            return
        if self._name in _OURS:
            return
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if isinstance(error, BlockingIOError):
                raise ValueError(
                    f"{folder}: another run is at work in it; wait until it has ended, or name another folder"
                ) from None
            return  # a file system without locks
        self._handle = handle
        _OURS.add(self._name)

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
            _OURS.discard(self._name)

    __del__ = release
