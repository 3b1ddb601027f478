"""Scenes -> pictures, by casting rays: `render(scenes, size)` gives uint8 (b, 3, size, size).

Every solid is convex, so a ray meets it in one interval, found in closed form in the solid's own frame, where its radius is 1.
Each pixel is the mean of a few rays, and each of those looks towards another point of the lamp, which softens the shadows.
Light is the Lambert and Blinn-Phong kind (Blinn 1977), added up in sRGB rather than in linear light: simple, and pretty.

Inside, a vector is a tensor (3, solids, rays): coordinates first, so that each coordinate lies in one piece.
"""

from collections.abc import Sequence
from math import cos, radians, sin

import numpy as np
import torch
from torch import Tensor

from ldm.scenes.world import CAMERA_ELEVATION, COLOURS, FIELD_OF_VIEW, SHAPES, Scene

LAMP_ELEVATION = 52.0  # degrees
LAMP_SPREAD = 0.11  # radians from the middle of the lamp to its rim
AMBIENT, DIFFUSE, SHINE, SHINE_POWER = 0.44, 0.62, 0.22, 24.0
FLOOR_AMBIENT, FLOOR_DIFFUSE = 0.50, 0.50
FADE = 0.045  # how fast the floor gets dark with the distance from the middle, a unit
EPSILON = 1e-4
CHUNK = 16  # scenes at a time
FAR = 1e6


def render(scenes: Sequence[Scene], size: int, *, rays: int = 2, device: str | torch.device = "cpu") -> Tensor:
    """Pictures of the scenes: uint8 (b, 3, size, size). rays: along one side of a pixel, so rays^2 a pixel."""
    pictures = [_render(scenes[i : i + CHUNK], size, rays, torch.device(device)) for i in range(0, len(scenes), CHUNK)]
    return torch.cat(pictures)


def _render(scenes: Sequence[Scene], size: int, rays: int, device: torch.device) -> Tensor:
    origin, direction = _camera(scenes, size, rays, device)  # (3, b, 1) and (3, b, r)
    lamp = _lamp(scenes, size, rays, device)  # (3, b, r)
    solids = _Solids(scenes, device)

    depth, normal, colour = solids.first_hit(origin, direction)
    on_floor = -origin[1] / direction[1].clamp(max=-EPSILON)
    is_floor = on_floor < depth
    depth = torch.where(is_floor, on_floor, depth)
    point = origin + depth * direction
    up = torch.tensor([0.0, 1.0, 0.0], device=device).view(3, 1, 1)
    normal = torch.where(is_floor, up, normal)

    facing = (normal * lamp).sum(0).clamp(min=0)
    lit = ~solids.blocked(point + 1e-3 * normal, lamp) * facing
    halfway = lamp - direction
    halfway = _unit(halfway)
    shine = (normal * halfway).sum(0).clamp(min=0) ** SHINE_POWER * (lit > 0)

    floor = torch.tensor([scene.floor for scene in scenes], device=device).T[:, :, None]
    away = (point[0] ** 2 + point[2] ** 2).sqrt()
    floor = floor * (FLOOR_AMBIENT + FLOOR_DIFFUSE * lit / sin(radians(LAMP_ELEVATION))) * torch.exp(-FADE * away)
    solid = colour * (AMBIENT + DIFFUSE * lit) + SHINE * shine
    image = torch.where(is_floor, floor, solid).clamp(0, 1)
    image = image.view(3, len(scenes), size, rays, size, rays).mean(dim=(3, 5))
    return (image * 255).round().to(torch.uint8).transpose(0, 1).contiguous()


def _camera(scenes: Sequence[Scene], size: int, rays: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where every scene's rays start (3, b, 1) and their unit directions (3, b, r), row by row from the top left."""
    elevation, turn = radians(CAMERA_ELEVATION), np.array([scene.turn for scene in scenes])
    back = np.stack([np.sin(turn) * cos(elevation), np.full_like(turn, sin(elevation)), np.cos(turn) * cos(elevation)])
    right = np.stack([np.cos(turn), np.zeros_like(turn), -np.sin(turn)])
    above = np.cross(back, right, axis=0)
    target = np.array([scene.target for scene in scenes]).T
    origin = target + back * [scene.distance for scene in scenes]

    n = size * rays
    across = (torch.arange(n, device=device) + 0.5) / n * 2 - 1
    across = across * np.tan(radians(FIELD_OF_VIEW / 2))
    y, x = torch.meshgrid(-across, across, indexing="ij")
    to = lambda v: torch.tensor(v, dtype=torch.float32, device=device)[:, :, None]  # noqa: E731
    direction = to(right) * x.flatten() + to(above) * y.flatten() - to(back)
    return to(origin), _unit(direction)


def _lamp(scenes: Sequence[Scene], size: int, rays: int, device: torch.device) -> Tensor:
    """Unit directions to the lamp (3, b, r): each ray of a pixel looks to another point of its rim."""
    i = torch.arange(size * rays, device=device) % rays
    which = (i[:, None] * rays + i[None, :]).flatten()
    around = 2 * torch.pi * (which + 0.5) / rays**2
    turn = torch.tensor([scene.light for scene in scenes], device=device)[:, None] + LAMP_SPREAD * around.cos()
    elevation = radians(LAMP_ELEVATION) + LAMP_SPREAD * around.sin()
    return torch.stack([turn.sin() * elevation.cos(), elevation.sin().expand_as(turn), turn.cos() * elevation.cos()])


class _Solids:
    """All solids of a batch of scenes, sorted by shape so that each shape's formula runs once."""

    def __init__(self, scenes: Sequence[Scene], device: torch.device):
        rows = [(list(SHAPES).index(s.shape), i, s) for i, scene in enumerate(scenes) for s in scene.solids]
        rows.sort(key=lambda row: row[0])
        self.scene = torch.tensor([i for _, i, _ in rows], device=device)
        self.counts = [sum(shape == k for shape, _, _ in rows) for k in range(len(SHAPES))]
        column = lambda values: torch.tensor(values, dtype=torch.float32, device=device)  # noqa: E731
        self.centre = column([s.centre for *_, s in rows]).T[:, :, None]
        self.radius = column([s.radius for *_, s in rows])[:, None]
        self.colour = column([COLOURS[s.colour] for *_, s in rows]).T[:, :, None]
        yaw = column([s.yaw for *_, s in rows])[:, None]
        self.cos, self.sin = yaw.cos(), yaw.sin()

    def first_hit(self, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distance to the nearest solid (b, r), FAR where there is none; its normal and colour there (3, b, r)."""
        near, normal = self._intersect(origin, direction)
        b, r = direction.shape[1:]
        depth = torch.full((b, r), FAR, device=near.device)
        found_normal, found_colour = torch.zeros(2, 3, b, r, device=near.device)
        for k in range(len(self.scene)):
            i = int(self.scene[k])
            closer = near[k] < depth[i]
            depth[i] = torch.where(closer, near[k], depth[i])
            found_normal[:, i] = torch.where(closer, normal[:, k], found_normal[:, i])
            found_colour[:, i] = torch.where(closer, self.colour[:, k], found_colour[:, i])
        return depth, found_normal, found_colour

    def blocked(self, origin: Tensor, direction: Tensor) -> Tensor:
        """Whether any solid is in the way (b, r)."""
        near, _ = self._intersect(origin, direction, normals=False)
        hit = torch.zeros(direction.shape[1:], dtype=torch.int32, device=near.device)
        return hit.index_add_(0, self.scene, (near < FAR).int()) > 0

    def _intersect(self, origin: Tensor, direction: Tensor, *, normals: bool = True) -> tuple[Tensor, Tensor | None]:
        """Every solid against its own scene's rays: distance (solids, r) and normal (3, solids, r)."""
        o = self._inward(origin[:, self.scene] - self.centre)
        d = self._inward(direction[:, self.scene])
        nears, found = [], []
        start = 0
        for (half_width, half_height), count, hit in zip(SHAPES.values(), self.counts, _HITS, strict=True):
            if count:
                part = slice(start, start + count)
                near, normal = hit(o[:, part], d[:, part], half_width, half_height, normals)
                nears.append(near)
                found.append(normal)
            start += count
        near = torch.cat(nears)
        if not normals:
            return near, None
        x, y, z = torch.cat(found, dim=1)
        return near, torch.stack([self.cos * x + self.sin * z, y, self.cos * z - self.sin * x])

    def _inward(self, v: Tensor) -> Tensor:
        """World -> the solid's frame: turned back, and with radius 1."""
        return (
            torch.stack([self.cos * v[0] - self.sin * v[2], v[1].expand(len(self.cos), -1), self.sin * v[0] + self.cos * v[2]])
            / self.radius
        )


def _unit(v: Tensor) -> Tensor:
    return v * (v * v).sum(0).clamp(min=1e-12).rsqrt()


def _sphere(o: Tensor, d: Tensor, width: float, height: float, normals: bool) -> tuple[Tensor, Tensor | None]:
    a, b, c = (d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - 1
    root = b * b - a * c
    near = (-b - root.clamp(min=0).sqrt()) / a
    near = near.masked_fill_((root <= 0) | (near < EPSILON), FAR)
    return near, o + near * d if normals else None


def _cube(o: Tensor, d: Tensor, width: float, height: float, normals: bool) -> tuple[Tensor, Tensor | None]:
    inverse = 1 / d
    middle, half = -o * inverse, width * inverse.abs()
    enter, leave = middle - half, (middle + half).amin(0)
    near, axis = enter.max(0)
    near = near.masked_fill_((near > leave) | (near < EPSILON), FAR)
    if not normals:
        return near, None
    own = torch.arange(3, device=o.device).view(3, 1, 1) == axis
    return near, -d.sign() * own


def _cylinder(o: Tensor, d: Tensor, width: float, height: float, normals: bool) -> tuple[Tensor, Tensor | None]:
    a, b = d[0] ** 2 + d[2] ** 2, o[0] * d[0] + o[2] * d[2]
    root = b * b - a * (o[0] ** 2 + o[2] ** 2 - width**2)
    reach = root.clamp(min=0).sqrt()
    inverse = 1 / d[1]
    enter_caps, leave_caps = -o[1] * inverse - height * inverse.abs(), -o[1] * inverse + height * inverse.abs()
    enter_side = (-b - reach) / a
    near, leave = torch.maximum(enter_side, enter_caps), torch.minimum((reach - b) / a, leave_caps)
    near = near.masked_fill_((root <= 0) | (near > leave) | (near < EPSILON), FAR)
    if not normals:
        return near, None
    side = o + near * d
    flat = torch.zeros_like(side)
    side[1] = 0
    flat[1] = -d[1].sign()
    return near, torch.where(enter_side > enter_caps, side / width, flat)


def _cone(o: Tensor, d: Tensor, width: float, height: float, normals: bool) -> tuple[Tensor, Tensor | None]:
    slope = (width / (2 * height)) ** 2
    down, along = height - o[1], -d[1]  # measured from the tip
    a = d[0] ** 2 + d[2] ** 2 - slope * along**2
    a = torch.where(a.abs() < 1e-7, 1e-7, a)
    b = o[0] * d[0] + o[2] * d[2] - slope * down * along
    c = o[0] ** 2 + o[2] ** 2 - slope * down**2
    root = b * b - a * c
    reach = root.clamp(min=0).sqrt()
    side = torch.full_like(a, FAR)
    for t in ((-b - reach) / a, (-b + reach) / a):
        level = down + t * along
        there = (root > 0) & (level >= 0) & (level <= 2 * height) & (t > EPSILON) & (t < side)
        side = torch.where(there, t, side)
    base = (-height - o[1]) / d[1]
    inside = (o[0] + base * d[0]) ** 2 + (o[2] + base * d[2]) ** 2 < width**2
    base = base.masked_fill_(~inside | (base < EPSILON), FAR)
    near = torch.minimum(side, base)
    if not normals:
        return near, None
    point = o + near * d
    outward = torch.stack([point[0], slope * (height - point[1]), point[2]])
    outward = _unit(outward)
    below = torch.tensor([0.0, -1.0, 0.0], device=o.device).view(3, 1, 1)
    return near, torch.where(base < side, below, outward)


_HITS = (_sphere, _cube, _cylinder, _cone)  # in the order of SHAPES
