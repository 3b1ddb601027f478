"""What a scene is: one to three solids on a floor, and how the scene of an index is drawn.

Solids stand on a lattice of places, so that who is left of, on or behind whom is a fact and not a matter of opinion; each
is then moved a little. Axes: x to the right, y up, z towards the viewer. `draw(seed, index)` is a pure function of its
arguments: data sets are nothing but a seed and a range of indices.

Some combinations of colour, shape and role ("an orange cone at the left of something") are held out by a rule: no scene that
is trained on has one, so that what a model makes of them it has put together itself.
"""

from dataclasses import dataclass, replace
from math import radians, sin, tan

import numpy as np

COLOURS = {  # as they look in full light, sRGB in [0, 1]
    "red": (0.86, 0.10, 0.10),
    "orange": (0.98, 0.52, 0.06),
    "yellow": (0.96, 0.90, 0.12),
    "green": (0.10, 0.62, 0.16),
    "cyan": (0.12, 0.82, 0.84),
    "blue": (0.12, 0.20, 0.88),
    "purple": (0.58, 0.14, 0.74),
    "white": (0.97, 0.97, 0.97),
}
SHAPES = {"sphere": (1.0, 1.0), "cube": (0.72, 0.72), "cylinder": (0.75, 0.9), "cone": (0.95, 1.0)}  # half width, half height
SIZES = {"small": 0.37, "medium": 0.5, "large": 0.63}  # the radius that half width and half height are multiples of
ROLES = ("left", "right", "bottom", "top", "back", "front")  # two an axis, the lower coordinate first

Place = tuple[int, int, int]
Content = tuple[str, str]  # colour, shape
Noun = tuple[str | None, str, str]  # size or None, colour, shape
# All arrangements, each in the order of its places (which is also the order of a scene's solids).
LAYOUTS: dict[str, tuple[Place, ...]] = {
    "alone": ((0, 0, 0),),
    "side by side": ((0, 0, 0), (1, 0, 0)),
    "stacked": ((0, 0, 0), (0, 1, 0)),
    "in depth": ((0, 0, 0), (0, 0, 1)),
    "row": ((0, 0, 0), (1, 0, 0), (2, 0, 0)),
    "stack left": ((0, 0, 0), (0, 1, 0), (1, 0, 0)),
    "stack right": ((0, 0, 0), (1, 0, 0), (1, 1, 0)),
    "corner back left": ((0, 0, 0), (0, 0, 1), (1, 0, 0)),
    "corner front left": ((0, 0, 0), (0, 0, 1), (1, 0, 1)),
    "corner back right": ((0, 0, 0), (1, 0, 0), (1, 0, 1)),
    "corner front right": ((0, 0, 1), (1, 0, 0), (1, 0, 1)),
}
BY_COUNT = tuple(tuple(name for name, places in LAYOUTS.items() if len(places) == n) for n in (1, 2, 3))
COUNT_ODDS = (0.12, 0.64, 0.24)
SPLITS = ("train", "held_out", "any")


@dataclass(frozen=True, kw_only=True)
class Solid:
    """One solid: what it is, and where its middle is; `yaw` in radians turns it about the vertical."""

    colour: str
    shape: str
    size: str
    centre: tuple[float, float, float]
    yaw: float = 0.0

    @property
    def radius(self) -> float:
        return SIZES[self.size]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Solids in the order of their layout's places, seen by a camera, under a light. Angles in radians."""

    layout: str
    solids: tuple[Solid, ...]
    target: tuple[float, float, float]  # what the camera looks at
    distance: float  # from there to the camera
    turn: float  # the camera's, about the vertical
    light: float  # the light's, about the vertical; 0 is from the viewer
    floor: tuple[float, float, float]

    @property
    def nouns(self) -> tuple[Noun, ...]:
        """Size, colour and shape of every solid, in the order of the places."""
        return tuple((solid.size, solid.colour, solid.shape) for solid in self.solids)


def neighbours(layout: str) -> tuple[tuple[int, int, int], ...]:
    """Pairs of solids (i, j) that are next to each other along an axis (0 x, 1 y, 2 z), i at the lower coordinate."""
    places = LAYOUTS[layout]
    found = []
    for i, first in enumerate(places):
        for j, second in enumerate(places):
            step = [b - a for a, b in zip(first, second, strict=True)]
            if sorted(step) == [0, 0, 1]:
                found.append((i, j, step.index(1)))
    return tuple(found)


def is_held_out(layout: str, contents: tuple[Content, ...]) -> bool:
    """Whether any solid is in a role that its colour and shape are never trained in: one colour in eight for each shape
    and role."""
    return any(
        _held_out_role(contents[k], role) for i, j, axis in neighbours(layout) for k, role in ((i, 2 * axis), (j, 2 * axis + 1))
    )


def _held_out_role(content: Content, role: int) -> bool:
    colour, shape = list(COLOURS).index(content[0]), list(SHAPES).index(content[1])
    return (colour + 2 * shape + 3 * role) % len(COLOURS) == 0


def mirrored(scene: Scene) -> Scene:
    """The scene as a mirror shows it, left for right: what its picture shows when it is flipped."""
    places = LAYOUTS[scene.layout]
    widest = max(x for x, _, _ in places)
    flipped = [(widest - x, y, z) for x, y, z in places]
    order = sorted(range(len(places)), key=lambda k: flipped[k])
    layout = next(name for name, other in LAYOUTS.items() if other == tuple(flipped[k] for k in order))
    solids = []
    for solid in (scene.solids[k] for k in order):
        x, y, z = solid.centre
        solids.append(replace(solid, centre=(-x, y, z), yaw=-solid.yaw))
    x, y, z = scene.target
    return replace(scene, layout=layout, solids=tuple(solids), target=(-x, y, z), turn=-scene.turn, light=-scene.light)


def draw(seed: int, index: int, *, split: str = "train", layouts: tuple[str, ...] | None = None) -> Scene:
    """Scene `index` of the data set `seed`. split: "train" has no combination that is held out, "held_out" at least one,
    "any" does not look.

    layouts: draw one of these, all as likely as each other; otherwise by `COUNT_ODDS`.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}; expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng((seed, index, SPLITS.index(split)))
    while True:
        if layouts is None:
            count = 1 + rng.choice(2) if split == "held_out" else rng.choice(3, p=COUNT_ODDS)
        names = layouts or BY_COUNT[count]
        layout = names[rng.integers(len(names))]
        contents = tuple(
            (tuple(COLOURS)[rng.integers(len(COLOURS))], tuple(SHAPES)[rng.integers(len(SHAPES))]) for _ in LAYOUTS[layout]
        )
        if split == "any" or is_held_out(layout, contents) == (split == "held_out"):
            return arrange(layout, contents, rng)


def arrange(layout: str, contents: tuple[Content, ...], rng: np.random.Generator) -> Scene:
    """A scene of this layout and these (colour, shape), everything else drawn from `rng`."""
    sizes = _sizes(layout, rng)
    heights = [SIZES[size] * SHAPES[shape][1] for size, (_, shape) in zip(sizes, contents, strict=True)]
    yaws = [radians(rng.uniform(15, 75)) for _ in contents]
    centres: dict[int, tuple[float, float, float]] = {}
    for k, (other, axis, sign) in _ways(layout).items():
        if other is None:
            centres[k] = (0.0, heights[k], 0.0)
            continue
        centre = list(centres[other])
        if axis == 1:
            sunk = 0.14 * SIZES[sizes[other]] if contents[other][1] == "cone" else 0.0
            centre[1] += heights[other] - sunk + heights[k]
            centre[0] += rng.uniform(-0.05, 0.05)
        else:
            centre[1] = heights[k]
            centre[axis] += sign * _apart(
                axis, sizes[k], sizes[other], *(heights[i] for i in sorted((k, other), key=lambda i: LAYOUTS[layout][i])), rng
            )
            centre[2 - axis] += rng.uniform(-0.1, 0.1) if axis == 0 else rng.uniform(0.2, 0.4) * rng.choice((-1, 1))
        centres[k] = tuple(centre)
    solids = tuple(
        Solid(colour=colour, shape=shape, size=sizes[k], centre=centres[k], yaw=yaws[k])
        for k, (colour, shape) in enumerate(contents)
    )
    return _framed(layout, solids, rng)


def _sizes(layout: str, rng: np.random.Generator) -> list[str]:
    """A size for each solid; a larger one would hide a smaller one under it or behind it, so those are exchanged."""
    order = list(SIZES)
    sizes = [order[rng.choice(3, p=(0.25, 0.5, 0.25))] for _ in LAYOUTS[layout]]
    for i, j, axis in neighbours(layout):
        if axis > 0 and order.index(sizes[i]) < order.index(sizes[j]):
            sizes[i], sizes[j] = sizes[j], sizes[i]
    return sizes


def _ways(layout: str) -> dict[int, tuple[int | None, int, int]]:
    """How to place every solid: first the one that all others are next to, then each of those along (axis, sign) from it."""
    pairs = neighbours(layout)
    degree = [sum(k in (i, j) for i, j, _ in pairs) for k in range(len(LAYOUTS[layout]))]
    hub = degree.index(max(degree))
    ways: dict[int, tuple[int | None, int, int]] = {hub: (None, 0, 0)}
    for i, j, axis in pairs:
        ways[j if i == hub else i] = (hub, axis, 1 if i == hub else -1)
    return ways


def _apart(axis: int, size: str, other: str, back: float, front: float, rng: np.random.Generator) -> float:
    """How far apart two neighbours on the floor are. In depth, so far that most of the one behind (half its height is `back`)
    is seen over the one in front."""
    apart = SIZES[size] + SIZES[other] + rng.uniform(0.08, 0.22)
    if axis == 2:
        apart = max(apart, (2.1 * front - 0.7 * back) / tan(radians(CAMERA_ELEVATION)))
    return apart


CAMERA_ELEVATION = 35.0  # degrees above the floor
FIELD_OF_VIEW = 30.0  # degrees


def _framed(layout: str, solids: tuple[Solid, ...], rng: np.random.Generator) -> Scene:
    """Look at the middle of the solids, from as far as it takes to have all in the picture, but never close up."""
    low = np.min([np.array(s.centre) - s.radius for s in solids], axis=0)
    high = np.max([np.array(s.centre) + s.radius for s in solids], axis=0)
    middle = (low + high) / 2
    reach = max(np.linalg.norm(np.array(s.centre) - middle) + s.radius * np.hypot(*SHAPES[s.shape]) for s in solids)
    target = middle + rng.uniform(-0.06, 0.06, size=3)
    grey = rng.uniform(0.36, 0.46)
    return Scene(
        layout=layout,
        solids=solids,
        target=tuple(map(float, target)),
        distance=float(max(reach, 1.0) / sin(radians(FIELD_OF_VIEW / 2))),
        turn=radians(rng.uniform(-8, 8)),
        light=radians(rng.uniform(25, 60) * rng.choice((-1, 1))),
        floor=tuple(float(grey + rng.uniform(-0.025, 0.025)) for _ in range(3)),
    )
