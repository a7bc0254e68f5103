"""``builtin:shapes``: generated labelled images, for experiments without any data.

Each image shows one large textured shape in front of a dead-leaves background (overlapping shaded discs,
Matheron's model of natural image statistics; Lee, Mumford and Huang, IJCV 2001), with sensor noise. The
label is the texture. Shape, colors, position, size, rotation, phase and light are random and independent
of the label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simmim.data.clips import Frames
from simmim.data.decode import TensorImage
from simmim.rng import random_bits, uniform

SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("plain", "stripes", "checks", "rings")
MOTIONS = ("sinking", "rising")
NUM_FRAMES = 16
GRAIN = 0.05
CACHE_BYTES = 256 << 20  # cache of drawn images, because drawing takes longer than a step of a small encoder
_NUM_LEAVES = 3
_LEAF_DRAWS = 5  # plus a color
_OBJECT_DRAWS = 8  # plus two colors
_VALIDATION_START = 1 << 40  # validation images use other indices, so no image is in both splits


class Shapes:
    """A source of ``num_images`` images of ``size`` ``(H, W)``; an image depends only on its index.

    Lengths are relative to the shorter side: a larger image shows the same scene.
    """

    classes: Sequence[str] = TEXTURES
    blocks = None

    def __init__(
        self, num_images: int, size: tuple[int, int] = (64, 64), channels: int = 3, *, validation: bool = False
    ) -> None:
        self.num_images, self.size, self.channels = num_images, size, channels
        self.start = _VALIDATION_START if validation else 0
        self._cache: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.num_images

    def name(self, index: int) -> str:
        return f"builtin:shapes/{self.start + index}"

    def label(self, index: int) -> int:
        """Return the index of the texture in ``TEXTURES``."""
        return self._classes(self._draws(index))[1]

    def fetch(self, index: int) -> int:
        """Return the index itself: there is nothing to read."""
        return index

    def decode(self, content: int) -> Any:
        """Draw the image, which takes about as long as decoding one."""
        return TensorImage(self.read(content))

    def read(self, index: int) -> Tensor:
        """Return the image, uint8 ``(c, H, W)``, or the video, uint8 ``(c, T, H, W)``."""
        if index in self._cache:
            return self._cache[index]
        image = self._draw(index)
        if (len(self._cache) + 1) * image.nbytes <= CACHE_BYTES:
            self._cache[index] = image
        return image

    def paint(self, index: int, background: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw an image, uint8 ``(c, H, W)``, and the mask of its shape, bool ``(H, W)``.

        Args:
            background: float ``(c, H, W)`` in [0, 1], instead of dead leaves.
        """
        y, x = _coordinates(self.size)
        scene, inside = self._scene(index, y, x, y, background)
        return self._to_uint8(index, scene), inside

    def _draw(self, index: int) -> Tensor:
        return self.paint(index)[0]

    def _scene(
        self, index: int, y: Tensor, x: Tensor, own_y: Tensor, background: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw a scene, float ``(c, H, W)`` in [0, 1], and the mask of its shape.

        Args:
            own_y: row coordinates relative to the shape, for one frame, or ``(T, 1, H, W)`` for several frames, which
                gives ``(T, c, H, W)``.
        """
        draws = self._draws(index)
        shape, texture = self._classes(draws)
        leaves, rest = draws[2:].split([_NUM_LEAVES * (_LEAF_DRAWS + self.channels), _OBJECT_DRAWS + 2 * self.channels])
        if background is None:
            background = _dead_leaves(leaves.view(_NUM_LEAVES, -1), y, x)
        return _draw_object(background, rest, own_y, x, shape, texture)

    def _to_uint8(self, index: int, scene: Tensor) -> Tensor:
        """Add sensor noise and convert to uint8."""
        return ((scene + self._grain(index, scene.shape)).clamp(0, 1) * 255).round().to(torch.uint8)

    def _grain(self, index: int, shape: Sequence[int]) -> Tensor:
        """Make sensor noise, uniform in +-``GRAIN``, from one random byte per value."""
        sample = torch.tensor([self.start + index])
        words = random_bits("grain", 0, torch.zeros_like(sample), sample, -(-math.prod(shape) // 8))
        values = words.view(torch.uint8).flatten()[: math.prod(shape)].view(shape)
        return (values / 127.5 - 1) * GRAIN

    def _draws(self, index: int) -> Tensor:
        count = 2 + _NUM_LEAVES * (_LEAF_DRAWS + self.channels) + _OBJECT_DRAWS + 2 * self.channels
        sample = torch.tensor([self.start + index])
        return uniform("shapes", 0, torch.zeros_like(sample), sample, count)[0].float()

    def _classes(self, draws: Tensor) -> tuple[int, int]:
        """Return the indices of shape and texture."""
        return int(draws[0] * len(SHAPES)), int(draws[1] * len(TEXTURES))


class MovingShapes(Shapes):
    """The same scenes as videos of 16 frames, in which the shape moves down or up.

    The label combines texture, which is visible in every single frame, and motion, which is not.
    """

    classes = tuple(f"{texture}, {motion}" for texture in TEXTURES for motion in MOTIONS)

    def label(self, index: int) -> int:
        return len(MOTIONS) * super().label(index) + int(self._motion(index)[0] * len(MOTIONS))

    def decode(self, content: int) -> Frames:
        return Frames(self.read(content))

    def paint(self, index: int, background: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw a video, uint8 ``(c, T, H, W)``, with a still background, and the shape masks, bool ``(T, H, W)``."""
        direction, speed = self._motion(index)
        distance = (1 if direction < 0.5 else -1) * (0.6 + 0.6 * speed)  # from the first frame to the last
        moved = distance * torch.linspace(-0.5, 0.5, NUM_FRAMES)[:, None, None, None]
        y, x = _coordinates(self.size)
        scene, inside = self._scene(index, y, x, y - moved, background)
        return self._to_uint8(index, scene.transpose(0, 1)), inside[:, 0]

    def _motion(self, index: int) -> list[float]:
        sample = torch.tensor([self.start + index])
        return uniform("motion", 0, torch.zeros_like(sample), sample, 2)[0].tolist()


def _coordinates(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the coordinates of pixel centers: 0 in the middle, -1 to 1 along the shorter side."""
    half = min(size) / 2
    y, x = ((torch.arange(n) + 0.5 - n / 2) / half for n in size)
    return y[:, None].expand(size), x[None, :].expand(size)


def _dead_leaves(draws: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Draw overlapping shaded discs, the last on top: float ``(channels, H, W)`` in [0, 1]."""
    radius = 0.3 * 5 ** draws[:, 2]  # log-uniform from 0.3 to 1.5
    inside = (y - y.max() * (2 * draws[:, 0, None, None] - 1)) ** 2 + (
        x - x.max() * (2 * draws[:, 1, None, None] - 1)
    ) ** 2 < radius[:, None, None] ** 2
    inside[0] = True  # the first leaf covers everything
    top = (inside * torch.arange(1, len(draws) + 1)[:, None, None]).argmax(dim=0)
    angle, strength = 2 * math.pi * draws[:, 3], 0.9 * draws[:, 4]
    light = 1 + strength[top] * (y * angle.sin()[top] + x * angle.cos()[top])
    return (draws[:, _LEAF_DRAWS:][top].permute(2, 0, 1) * light).clamp(0, 1)


def _draw_object(image: Tensor, draws: Tensor, y: Tensor, x: Tensor, shape: int, texture: int) -> tuple[Tensor, Tensor]:
    """Draw the object onto the image; return the image and the mask of the object."""
    position, size, angle, period, phase, tilt, light = draws[:2], *draws[2:8].tolist()
    channels = image.shape[0]
    first, second = draws[_OBJECT_DRAWS:].view(2, channels)
    # Shift channels in which the two colors are too similar to be distinguished.
    second = torch.where((first - second).abs() < 0.35, (first + 0.5) % 1, second)
    radius = 0.9 + 0.3 * size
    offset = (2 * position - 1) * 0.2
    dy, dx = y - offset[0], x - offset[1]
    u, v = _rotate(dy / radius, dx / radius, 0.5 * (2 * angle - 1))  # up to half a radian
    inside = _inside(shape, u, v)
    s, t = _rotate(dy, dx, math.pi * tilt)
    pattern = _pattern(texture, s, t, period=0.33 + 0.17 * period, phase=phase)
    color = torch.where(pattern, first[:, None, None], second[:, None, None])
    shading = 1 + 0.4 * (u * math.cos(6.28 * light) + v * math.sin(6.28 * light))
    return torch.where(inside, (color * shading).clamp(0, 1), image), inside


def _rotate(y: Tensor, x: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    return y * math.cos(angle) + x * math.sin(angle), x * math.cos(angle) - y * math.sin(angle)


def _inside(shape: int, u: Tensor, v: Tensor) -> Tensor:
    """Compute the mask of a shape, in coordinates in which every shape fits the unit disc."""
    if SHAPES[shape] == "disc":
        return u**2 + v**2 < 0.8
    if SHAPES[shape] == "square":
        return torch.maximum(u.abs(), v.abs()) < 0.75
    if SHAPES[shape] == "triangle":
        return (u > -0.5) & (u + math.sqrt(3) * v.abs() < 1)
    return torch.minimum(u.abs(), v.abs()).lt(0.3) & torch.maximum(u.abs(), v.abs()).lt(0.95)


def _pattern(texture: int, s: Tensor, t: Tensor, *, period: float, phase: float) -> Tensor:
    """Compute the mask of pixels that have the first of the two colors."""
    if TEXTURES[texture] == "plain":
        return torch.ones_like(s, dtype=torch.bool)
    if TEXTURES[texture] == "stripes":
        return (s / period + phase) % 1 < 0.5
    if TEXTURES[texture] == "checks":
        return ((s / period + phase) % 1 < 0.5) ^ ((t / period + phase) % 1 < 0.5)
    return (torch.sqrt(s**2 + t**2) / period + phase) % 1 < 0.5
