"""Recipes as files: TOML tables -> the frozen dataclasses of the training scripts, every field checked by name and type."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

T = TypeVar("T")
MAY_BE_ZERO = ("seed", "warm_up", "limit", "min_side")  # of the whole numbers


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ValueError, one line, where it is not one."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: cannot be read as TOML ({reason})") from None


def with_settings(table: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A table with settings of the form "model.heads=4" put over it; the right-hand side is TOML, or a bare word."""
    table = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"setting {setting!r}; expected NAME=VALUE, as in batch=32 or optimiser.learning_rate=1e-3")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        *outer, last = name.strip().split(".")
        place = table
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise ValueError(f"setting {setting!r}: {key} has no fields")
        place[last] = value
    return table


def make(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """A recipe of this kind, its defaults where the table says nothing. where: names the table in errors."""
    hints, fields = get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    for name, value in table.items():
        if name not in fields:
            raise ValueError(f"{where}: unknown setting {name!r}; known are {', '.join(fields)}")
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: {name} is {value!r}; expected a table of settings")
            values[name] = make(hints[name], {**_given(fields[name]), **value}, f"{where}, {name}")
        else:
            values[name] = _converted(value, _default(fields[name]), f"{where}: {name}")
            _check_range(name, values[name], f"{where}: {name}")
    return kind(**values)


def _check_range(name: str, value: Any, where: str) -> None:
    """Sizes and counts are 1 or more, all other numbers 0 or more, and finite."""
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool | str):
            continue
        least = 1 if isinstance(number, int) and name not in MAY_BE_ZERO else 0
        if not least <= number < math.inf:
            raise ValueError(f"{where} is {number}; expected {least} or more, and finite")


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default is not dataclasses.MISSING else field.default_factory()


def _given(field: dataclasses.Field) -> dict[str, Any]:
    """What a nested default says other than its own kind does, so that naming one field leaves the others as they were."""
    return dataclasses.asdict(_default(field))


def _converted(value: Any, default: Any, where: str) -> Any:
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return tuple(_converted(v, default[0], where) for v in value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"{where} is {value!r}; expected something like {default!r}")
    return value
