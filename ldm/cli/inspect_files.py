"""What `ldm inspect` says of checkpoints and of traces."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SHOWN = 5  # names in a line


def is_trace(path: Path) -> bool:
    return (path / "manifest.json").exists()


def trace(path: Path) -> dict[str, Any]:
    """Its tensors, each name once, with shape, type and how often it is there."""
    from ldm.numerics.traces import Trace

    opened = Trace(path)
    counts = Counter(key.name for key in opened.keys)
    tensors = {}
    for key in opened.keys:
        if key.name not in tensors:
            tensor = opened[key]
            shown = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "times": counts[key.name]}
            tensors[key.name] = shown
    return {"file": str(path), "calls": opened.calls, "about": opened.about, "tensors": tensors}


def trace_lines(found: dict[str, Any]) -> list[str]:
    tensors = found["tensors"]
    width = max(map(len, tensors), default=0) + 2
    total = sum(tensor["times"] for tensor in tensors.values())
    lines = [f"{found['file']}: a trace of {total} tensors, {found['calls']} calls of the network"]
    for name, tensor in tensors.items():
        lines.append(f"  {name:<{width}}{tensor['shape']!s:<22}{tensor['dtype']:<10}x {tensor['times']}")
    return lines


# -- Checkpoints -----------------------------------------------------------------------------------------------------------


def checkpoint(path: Path, *, values: bool) -> dict[str, Any]:
    """What the doctor finds, file by file, as plain values; `wrong` where any of it keeps a model from being loaded."""
    from weights_convert.doctor import examine, examine_folder

    findings = examine_folder(path, values=values) if path.is_dir() else [examine(path, values=values)]
    layout = "a single file" if not path.is_dir() else _layout(path)
    whole = [_plain(one) | {"wrong": _wrong(one)} for one in findings]
    return {"file": str(path), "layout": layout, "files": whole, "wrong": any(one["wrong"] for one in whole)}


def _layout(path: Path) -> str:
    if (path / "model.json").exists():
        return "a native folder"
    return "a diffusers folder" if (path / "model_index.json").exists() else "a folder of unknown layout"


def _wrong(one: Any) -> list[str]:
    """In words: what keeps it from being loaded, or from being right."""
    found = [one.trouble] if one.trouble else []
    if one.other:
        found.append(f"it is {one.other}, not Stable Diffusion v1")
    for part in one.parts:
        names = part.names
        for what, listed in (("missing", names.missing), ("unexpected", names.unexpected), ("misshapen", names.misshapen)):
            if listed:
                found.append(f"{part.kind}: {len(listed)} {what}")
    if one.strangers and one.parts:
        found.append(f"{len(one.strangers)} tensors of no component")
    if not one.parts and not one.trouble and not one.other:
        found.append("no component of Stable Diffusion v1")
    for kind, numbers in one.numbers.items():
        if numbers.bad:
            found.append(f"{kind}: NaN or infinity in {len(numbers.bad)} tensors")
    return found


def _plain(value: Any) -> Any:
    """As JSON takes it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def checkpoint_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    if len(found["files"]) > 1 or found["layout"] != "a single file":
        lines.append(f"{found['file']}: {found['layout']}, {len(found['files'])} files of weights")
    for one in found["files"]:
        lines += _file_lines(one)
    return lines


def _file_lines(one: dict[str, Any]) -> Iterator[str]:
    yield f"{one['path']}: {one['size']:,} bytes, {one['container']}"
    yield f"  sha256: {one['sha256']}"
    old = f"; the old one {one['old_hash']}" if one["old_hash"] else ""
    yield f"  AUTOMATIC1111's short hash: {one['sha256'][:10]}{old}"
    yield f"  model: {_model(one)}"
    for part in one["parts"]:
        types = ", ".join(f"{count} {dtype}" for dtype, count in part["dtypes"].items())
        prefix = f" below {part['prefix']!r}" if part["prefix"] else ""
        size = f"{part['count']} tensors, {part['parameters']:,} numbers"
        yield f"  {part['kind']}: {part['naming']} names{prefix}, {size}, {types}"
        for name, (usual, here) in part["otherwise"].items():
            yield f"    {name} is {here}, in Stable Diffusion v1 {usual}"
        yield from _names(part["names"], part["prefix"])
        if part["kind"] in one["numbers"]:
            yield from _numbers(one["numbers"][part["kind"]])
    if one["ema"]:
        yield f"  weights: {one['ema']}"
    if one["leftovers"]:
        yield f"  no weights: {', '.join(f'{name} ({count})' for name, count in one['leftovers'].items())}"
    if one["strangers"]:
        yield f"  of no component: {_some(one['strangers'])}"
    for key, value in one["metadata"].items():
        yield f"  metadata {key}: {' '.join(value[:100].split())}{'...' if len(value) > 100 else ''}"
    if one["pickle"]:
        counts = sorted(one["pickle"]["instructions"].items(), key=lambda item: -item[1])
        yield f"  pickle, not run: {', '.join(f'{name} {count}' for name, count in counts)}"
        yield f"    it names {_some([repr(name[:100])[1:-1] for name in one['pickle']['names']], 20)}"
    for wrong in one["wrong"]:
        yield f"  WRONG: {wrong}"


def _model(one: dict[str, Any]) -> str:
    if one["known"]:
        weights = {"ema": "averaged weights", "full": "raw weights and their average"}[one["known"]["weights"]]
        return f"{one['known']['name']}, as it was published: Stable Diffusion {one['known']['version']}, {weights}"
    if one["other"]:
        return one["other"]
    if not one["parts"]:
        return "none that is known"
    unet = next((part for part in one["parts"] if part["kind"] == "unet"), None)
    if unet and unet["otherwise"].get("in_channels", [4, 4])[1] == 9:
        return "none of the published files; nearest Stable Diffusion v1 for inpainting"
    same = not any(part["otherwise"] for part in one["parts"])
    return f"none of the published files; {'the sizes of' if same else 'nearest, but of other sizes,'} Stable Diffusion v1"


def _names(names: dict[str, Any], prefix: str) -> Iterator[str]:
    if names["missing"]:
        near = [f"{prefix}{name}{f' (found {found}?)' if found else ''}" for name, found in names["missing"].items()]
        yield f"    missing {_grouped(names['missing'])}: {_some(near)}"
    if names["unexpected"]:
        yield f"    unexpected {_grouped(names['unexpected'])}: {_some([prefix + name for name in names['unexpected']])}"
    if names["misshapen"]:
        shapes = [f"{prefix}{name} is {here}, not {right}" for name, (right, here) in names["misshapen"].items()]
        yield f"    misshapen: {_some(shapes)}"


def _grouped(names: Any) -> str:
    """How many, and below what."""
    groups = Counter(".".join(name.split(".")[:2]) for name in names)
    return ", ".join(f"{count} of {group}" for group, count in groups.most_common(SHOWN)) + (
        ", ..." if len(groups) > SHOWN else ""
    )


def _numbers(numbers: dict[str, Any]) -> Iterator[str]:
    low, high, deviation = numbers["lowest"], numbers["highest"], numbers["deviation"]
    if not isinstance(low, str):
        yield f"    numbers: {low:.4g} to {high:.4g}, root mean square {deviation:.3g}"
    if numbers["bad"]:
        yield f"    NaN or infinity: {_some([f'{name} ({count})' for name, count in numbers['bad'].items()])}"
    if numbers["zero"]:
        yield f"    zero throughout: {_some(numbers['zero'])}"
    if numbers["beyond_half"]:
        yield f"    more than float16 holds: {_some(numbers['beyond_half'])}"


def _some(names: list[str], limit: int = SHOWN) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
