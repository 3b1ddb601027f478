"""Encode pictures and captions ahead of training, into shards: `ldm encode`.

A UNet is trained in the latents of a frozen autoencoder and on the states of a frozen text encoder. For data that pass by once,
on many machines, both are made once before (Rombach et al. 2022, arXiv:2112.10752, section 3, is why that may be). A folder of

    encoding.json      what was encoded with what; shards of anything else are never added
    00000.tar          samples in the order of the data: moments (2, c, h, w) of the picture's posterior and states (n, d) of
                       the caption, float16; the caption; and what was known of the sample. `__encoding__/` says what made them
    00000.json         how many of its samples could not be read
    drops.json         what was dropped in all, and why: written when all shards are there

The processes share the shards that are not there yet; of which samples a shard is depends on its number alone. It has a
temporary name until it is whole, and one that is there is kept: what was killed goes on when the same command is given again,
on any number of processes. Nothing trains on a folder that is not whole.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tarfile import TarInfo
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm.checkpoint import Components
from ldm.output.claim import Claim
from ldm.output.receipt import fingerprint
from ldm.processes import Processes
from ldm.training.cache import PIXELS_AT_ONCE, moments, states, tokenizer_fingerprint
from ldm.training.data import DataConfig, Folder, Shards
from ldm.training.filters import Drops
from ldm.training.keeping import PORTION
from ldm.training.shard_index import BEGUN, EMPTY, ENDED, SETTINGS, Encoding, webdataset


def encode(
    config: DataConfig,
    base: Components,
    out: Path,
    processes: Processes,
    *,
    samples_per_shard: int = 1000,
    quiet: bool = False,
) -> Drops:
    """Write the shards of the data to the folder `out`, those that are not there yet; returns what was dropped in all.

    base: gives tokenizer, text encoder and autoencoder. Raises ValueError, one line, where the data cannot be used, `out` holds
    something else, or another run is at work in it.
    """
    webdataset()
    _check(config, base, out, samples_per_shard)
    data = config.open(out / "data", processes, quiet=True)
    if data.encoding:
        raise ValueError(f"{config.source}: is encoded already; encode the pictures that it was made of")
    encoding = Encoding(
        autoencoder=fingerprint({"autoencoder": base.autoencoder}),
        text_encoder=fingerprint({"text_encoder": base.text_encoder}),
        tokenizer=tokenizer_fingerprint(base.tokenizer),
        size=config.size,
    )
    claim = Claim(out) if processes.leads else None
    _begin(out, {**asdict(encoding), "data": data.identity, "samples_per_shard": samples_per_shard}, processes)

    maker = _Maker(data, base, encoding, processes.device)
    shards = range(-(-len(data) // samples_per_shard))
    width = max(len(str(len(shards) - 1)), 5)
    files = [out / f"{i:0{width}}.tar" for i in shards]
    left = [i for i in shards if not files[i].exists()]
    processes.wait()  # until all have seen the same
    mine = left[processes.rank :: processes.count]
    for i in tqdm(mine, desc=out.name, unit="shard", disable=True if quiet or not processes.leads else None):
        first = i * samples_per_shard
        maker.make(files[i], range(first, min(first + samples_per_shard, len(data))))
    processes.wait()

    drops = Drops.from_json(data.drops.to_json())
    for file in files:
        for name in json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))["unreadable"]:
            drops.add("unreadable picture", name)
    if processes.leads:
        _write(out / ENDED, drops.to_json())
    if claim:
        claim.release()
    return drops


def _check(config: DataConfig, base: Components, out: Path, samples_per_shard: int) -> None:
    """Raises ValueError before anything is written."""
    if config.source == "scenes":
        raise ValueError("scenes are drawn, not read; name a folder of pictures with captions, or shards")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; expected a folder to write shards to")
    if next(out.glob("*.tar"), None) and not (out / BEGUN).exists():
        raise ValueError(f"{out}: holds shards that were not made here; name another folder")
    if samples_per_shard < 1:
        raise ValueError(f"samples per shard {samples_per_shard}; expected 1 or more")
    multiple = base.autoencoder.config.downsampling
    if config.size < 1 or config.size % multiple:
        raise ValueError(f"size {config.size}; expected a multiple of {multiple}")


def _begin(out: Path, settings: Mapping[str, Any], processes: Processes) -> None:
    """Say what the folder holds, or see that it is what is about to be added. Raises ValueError where it is not."""
    if processes.leads and not (out / BEGUN).exists():
        _write(out / BEGUN, settings)
    processes.wait()
    before = json.loads((out / BEGUN).read_text(encoding="utf-8"))
    changed = [name for name in settings if before.get(name) != settings[name]]
    if changed:
        was = ", ".join(f"{name.replace('_', ' ')} {before.get(name)} and not {settings[name]}" for name in changed)
        raise ValueError(f"{out}: holds shards with {was}; go on with those, or name another folder")


@dataclass(frozen=True)
class _Maker:
    """Makes one shard after the other."""

    data: Folder | Shards
    base: Components
    encoding: Encoding
    device: torch.device

    def make(self, file: Path, indices: range) -> None:
        """The shard of these samples, whole or not at all."""
        partial, unreadable = file.with_name(file.name + ".partial"), []
        empty = states(self.base.tokenizer, self.base.text_encoder, [""], self.device)[0]
        at_once = max(min(PORTION, PIXELS_AT_ONCE // self.encoding.size**2), 1)
        portions = [indices[start : start + at_once] for start in range(0, len(indices), at_once)]
        try:
            with open(partial, "wb") as opened:
                with webdataset().TarWriter(opened, user="", group="", mtime=0) as tar:
                    _note(tar, SETTINGS, json.dumps(asdict(self.encoding)).encode())
                    _note(tar, EMPTY, _bytes(empty.numpy()))
                    for portion, images in _ahead(self._read, portions):
                        pairs = zip(portion, images, strict=True)
                        unreadable += [self.data.name(i) for i, image in pairs if isinstance(image, ValueError)]
                        self._write(tar, portion, images)
                opened.flush()
                os.fsync(opened.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        _write(file.with_suffix(".json"), {"samples": len(indices) - len(unreadable), "unreadable": unreadable})
        os.replace(partial, file)

    def _read(self, portion: range) -> tuple[range, list[Tensor | ValueError]]:
        return portion, self.data.try_images(portion)

    def _write(self, tar: Any, portion: range, images: list[Tensor | ValueError]) -> None:
        whole = [i for i, image in zip(portion, images, strict=True) if not isinstance(image, ValueError)]
        if not whole:
            return
        captions = self.data.captions(whole)
        pixels = torch.stack([image for image in images if not isinstance(image, ValueError)])
        pairs = zip(
            moments(self.base.autoencoder, pixels, self.device).half().numpy(),
            states(self.base.tokenizer, self.base.text_encoder, captions, self.device).half().numpy(),
            strict=True,
        )
        for i, caption, (latents, context) in zip(whole, captions, pairs, strict=True):
            about = json.dumps({**self.data.metadata(i), "name": self.data.name(i)}).encode()
            sample = {"moments.npy": _bytes(latents), "states.npy": _bytes(context), "txt": caption, "json": about}
            tar.write({"__key__": f"{i:09}", **sample})


def _ahead(make: Callable[[Any], Any], parts: list[Any]) -> Iterator[Any]:
    """make(part) for each part; the next is begun while one is used."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(make, parts[0])
        for part in parts[1:]:
            following = worker.submit(make, part)
            yield coming.result()
            coming = following
        yield coming.result()


def _note(tar: Any, name: str, data: bytes) -> None:
    """A member that is of no sample."""
    about = TarInfo(name)
    about.size, about.mode = len(data), 0o444
    tar.tarstream.addfile(about, io.BytesIO(data))


def _bytes(array: np.ndarray) -> bytes:
    """As a .npy file."""
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _write(file: Path, about: Mapping[str, Any]) -> None:
    """A small JSON file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)
