"""Which samples are trained on, and what became of the others.

Stable Diffusion v1's model card: pictures with both sides of 512 pixels or more, an aesthetics score above 5.0, and a
watermark probability below 0.5 (LAION-aesthetics v2 5+). Scores are read from the metadata that LAION's tables have and
img2dataset writes beside each picture (`key.json`), or from the fields of a folder's `metadata.jsonl`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

NAMES = 20  # that a report has for each reason
REASONS = (  # in the order in which they are looked for
    *("no picture", "no caption", "a member twice"),
    "side too small",
    *("aesthetics score missing", "aesthetics score too low"),
    *("watermark probability missing", "watermark probability too high"),
    *("unsafe probability missing", "unsafe probability too high"),
    *("unreadable picture", "beyond the limit"),
)
Metadata = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What a sample must have to be kept; as it stands, all are. The card's: 512, 5.0 and 0.5.

    min_side: of the picture, in pixels, as the metadata say that it was found, or else as it is; 0 for any. aesthetic_above:
    0 for any. watermark_below, unsafe_below: probabilities, 1 for any. A sample whose metadata lack what is asked for is
    dropped, and counted on its own. The fields are names under which the metadata may have it; the first that is there counts.

    unreadable: "refuse" ends the run at a broken shard, and at a picture that cannot be decoded when it is needed; "drop"
    decodes every picture ahead of time, and counts those, and broken shards, as dropped.
    """

    min_side: int = 0
    aesthetic_above: float = 0.0
    watermark_below: float = 1.0
    unsafe_below: float = 1.0
    unreadable: str = "refuse"
    width_fields: tuple[str, ...] = ("original_width", "WIDTH")
    height_fields: tuple[str, ...] = ("original_height", "HEIGHT")
    aesthetic_fields: tuple[str, ...] = ("AESTHETIC_SCORE", "aesthetic", "aesthetic_score")
    watermark_fields: tuple[str, ...] = ("pwatermark", "watermark")
    unsafe_fields: tuple[str, ...] = ("punsafe", "unsafe")

    def check(self) -> None:
        """Raises ValueError where a setting is none of those allowed."""
        if self.unreadable not in ("refuse", "drop"):
            raise ValueError(f"data.filter.unreadable {self.unreadable!r}; expected refuse or drop")

    @property
    def asks_metadata(self) -> bool:
        """Whether a verdict depends on more than the picture's being there."""
        return bool(self.min_side or self.aesthetic_above) or min(self.watermark_below, self.unsafe_below) < 1


def verdict(config: FilterConfig, metadata: Metadata, size: Callable[[], tuple[int, int]]) -> str | None:
    """Why a sample is dropped, the first reason that holds; None where it is kept. size: the picture's own, in pixels."""
    if config.min_side:
        sides = [_number(metadata, names) for names in (config.width_fields, config.height_fields)]
        if min(size() if None in sides else sides) < config.min_side:
            return "side too small"
    if config.aesthetic_above:
        score = _number(metadata, config.aesthetic_fields)
        if score is None or score <= config.aesthetic_above:
            return f"aesthetics score {'missing' if score is None else 'too low'}"
    limits = {"watermark": (config.watermark_fields, config.watermark_below)}
    limits["unsafe"] = (config.unsafe_fields, config.unsafe_below)
    for name, (names, below) in limits.items():
        probability = _number(metadata, names) if below < 1 else 0.0
        if probability is None or probability >= below:
            return f"{name} probability {'missing' if probability is None else 'too high'}"
    return None


def _number(metadata: Metadata, names: tuple[str, ...]) -> float | None:
    """The first of these fields that is a number, possibly as text. LAION's tables have NaN where something is not known."""
    for name in names:
        try:
            value = float(metadata[name])
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(value):
            return value
    return None


@dataclass
class Drops:
    """How many samples were looked at, and of those not kept how many for which reason, the first few by name."""

    seen: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # shards, whose samples nobody can count

    @property
    def kept(self) -> int:
        return self.seen - sum(self.counts.values())

    def add(self, reason: str, name: str | None = None, count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        if name is not None and len(self.names.setdefault(reason, [])) < NAMES:
            self.names[reason].append(name)

    def include(self, other: "Drops") -> None:
        """Add what another part of the data had."""
        self.seen += other.seen
        self.broken += other.broken
        for reason, count in other.counts.items():
            self.add(reason, count=count)
            self.names[reason] = (self.names.get(reason, []) + other.names.get(reason, []))[:NAMES]

    def to_json(self) -> dict[str, Any]:
        """Plain values, reasons in the order in which they are looked for."""
        order = sorted(self.counts, key=REASONS.index)
        dropped = {reason: {"count": self.counts[reason], "first": self.names.get(reason, [])} for reason in order}
        return {"seen": self.seen, "kept": self.kept, "dropped": dropped, "broken_shards": self.broken}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Drops":
        dropped = found["dropped"]
        counts, names = ({reason: about[key] for reason, about in dropped.items()} for key in ("count", "first"))
        return cls(seen=found["seen"], counts=counts, names=names, broken=list(found["broken_shards"]))

    def summary(self) -> str:
        """One line: "kept 900 of 1,000 samples; dropped: 60 no caption (00000.tar: 000000007, ...), 40 ..."."""
        parts = [f"{self.counts[r]:,} {r}{_few(self.names.get(r))}" for r in sorted(self.counts, key=REASONS.index)]
        line = f"kept {self.kept:,} of {self.seen:,} samples" + (f"; dropped: {', '.join(parts)}" if parts else "")
        return line + (f"; {len(self.broken):,} broken shards{_few(self.broken)}" if self.broken else "")


def _few(names: list[str] | None) -> str:
    return f" ({names[0]}{', ...' if len(names) > 1 else ''})" if names else ""
