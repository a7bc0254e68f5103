"""Decoding of image files to resized crops, with as little work as the crop needs.

The crop box is chosen from the size in the header, before pixels are decoded. The resize reads the uint8
memory that Pillow decoded into: there is no copy of the image and no float image.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
BACKGROUND = (255, 255, 255)  # color behind transparent pixels
Box = tuple[int, int, int, int]
"""``(top, left, height, width)``, px."""

MAX_PIXELS = 89_478_485
"""Larger images are refused by the size in their header, before memory is allocated. Pillow's warning threshold."""
_ORIENTATION = 0x0112  # EXIF tag
# EXIF orientation -> (transpose, then flip left to right, then flip upside down).
_TURNS = {
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}
_ONE_BLOCK = 1 << 24  # bytes; Pillow stores larger images in several blocks
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_HAS_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class DecodedImage(Protocol):
    """An image from which crops can be taken."""

    @property
    def size(self) -> tuple[int, int]:
        """``(H, W)`` in px, after its EXIF orientation is applied."""

    @property
    def kind(self) -> str:
        """Format, and color mode if it is unusual, for statistics and messages."""

    def crop(self, box: Box, size: tuple[int, int], interpolation: str = "bilinear", *, flip: bool = False) -> Tensor:
        """Crop a box and resize it with antialiasing, optionally flipped left to right: uint8 ``(c, *size)``."""


def full_image(image: DecodedImage) -> Tensor:
    """Return all pixels of an image: uint8 ``(c, H, W)``."""
    return image.crop((0, 0, *image.size), image.size)


class TensorImage:
    """An image whose pixels are already decoded: uint8 ``(c, H, W)``."""

    def __init__(self, pixels: Tensor, kind: str = "array") -> None:
        self.pixels, self.kind = pixels, kind
        self.size = (pixels.shape[1], pixels.shape[2])

    def crop(self, box: Box, size: tuple[int, int], interpolation: str = "bilinear", *, flip: bool = False) -> Tensor:
        top, left, height, width = box
        result = _resize(self.pixels[None, :, top : top + height, left : left + width], size, interpolation)[0]
        return result.flip(-1) if flip else result


@dataclass(frozen=True)
class Decoder:
    """Decodes image files and arrays to uint8 images with a fixed number of channels.

    - Several frames: the first one; but a TIFF with ``channels`` pages has one channel per page.
    - Palette, CMYK, gray and bilevel images are converted. Transparency is shown over white, unless ``channels`` is 4.
    - EXIF orientation is applied.
    - Arrays (``.npy``, TIFF with more than four samples): ``(c, H, W)`` or ``(H, W, c)``, ``(H, W)`` for one channel.
    - More than 8 bits: ``value_range`` is mapped to 0..255 and clipped; without it, uint16 keeps its upper byte
      and other types are refused. 8-bit pixels are unchanged.

    Args:
        channels: number of channels of the result.
        value_range: pixel values that become 0 and 255, for files with more than 8 bits.
    """

    channels: int = 3
    value_range: tuple[float, float] | None = None

    def __call__(self, content: bytes | np.ndarray | Tensor) -> DecodedImage:
        """Read the header. Damaged content may raise any exception, here or when a crop is taken.

        Args:
            content: bytes of an image file; an array; or uint8 ``(c, H, W)``, which is used unchanged.
        """
        if isinstance(content, Tensor):
            return TensorImage(content)
        if isinstance(content, np.ndarray):
            return TensorImage(self._from_array(content))
        if not content:
            raise ValueError("the file is empty")
        if content.startswith(b"\x93NUMPY"):
            return TensorImage(self._from_array(_load_npy(content)), "NPY")
        try:
            image = open_image(content)
        except UnidentifiedImageError:
            if content.startswith(_TIFF):
                return TensorImage(self._from_array(_load_tiff(content)), "TIFF multi-channel")
            raise ValueError(f"unrecognized image format (starts with {content[:16]!r})") from None
        frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        if frames == self.channels > 1:
            return TensorImage(self._from_array(_pages(image, frames)), "TIFF multi-page")
        if self.channels not in MODES:
            raise ValueError(f"{image.format} with {len(image.getbands())} channel(s), expected {self.channels}")
        return _ImageFile(image, self)

    def _from_array(self, array: np.ndarray) -> Tensor:
        """Convert an array to uint8 ``(c, H, W)``."""
        if array.ndim == 2:
            array = array[None]
        if array.ndim != 3 or self.channels not in (array.shape[0], array.shape[2]):
            raise ValueError(f"array of shape {array.shape}: expected {self.channels} channels, first or last")
        if array.shape[0] != self.channels:
            array = array.transpose(2, 0, 1)
        return torch.from_numpy(np.array(self.to_bytes(array), order="C"))

    def to_bytes(self, array: np.ndarray) -> np.ndarray:
        """Convert pixels of any type to uint8."""
        if array.dtype == np.uint8:
            return array
        if array.dtype == np.bool_:
            return array.astype(np.uint8) * 255
        if self.value_range is None:
            if array.dtype == np.uint16:
                return (array >> 8).astype(np.uint8)
            raise ValueError(f"{array.dtype} pixels: set data.value_range to the values that are black and white")
        low, high = self.value_range
        scaled = (array.astype(np.float32) - low) * (255 / (high - low))
        return np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).round().clip(0, 255).astype(np.uint8)


class _ImageFile:
    """An image file of which only the header has been read."""

    def __init__(self, image: Image.Image, decoder: Decoder) -> None:
        self.image, self.decoder, self.mode = image, decoder, MODES[decoder.channels]
        self.transposed, self.mirrored, self.upside_down = _TURNS.get(_orientation(image), (False, False, False))
        width, height = image.size
        self.size = (width, height) if self.transposed else (height, width)

    @property
    def kind(self) -> str:
        turned = " turned" if self.transposed or self.mirrored or self.upside_down else ""
        return f"{self.image.format}{'' if self.image.mode in ('RGB', 'L') else f' {self.image.mode}'}{turned}"

    def crop(self, box: Box, size: tuple[int, int], interpolation: str = "bilinear", *, flip: bool = False) -> Tensor:
        top, left, height, width = box
        if self.mirrored:
            left = self.size[1] - left - width
        if self.upside_down:
            top = self.size[0] - top - height
        if self.transposed:
            top, left, height, width, size = left, top, width, height, (size[1], size[0])
        pixels = self._stored_crop((top, left, height, width), size, interpolation)
        # With interleaved channels, flipping whole pixels is many times faster than flipping each channel.
        if self.transposed:
            pixels = pixels.transpose(-1, -2)
        sides = [-1] * (self.mirrored != flip) + [-2] * self.upside_down
        pixels = _mirror(pixels, sides) if sides else pixels
        return pixels[: self.decoder.channels]

    def _stored_crop(self, box: Box, size: tuple[int, int], interpolation: str) -> Tensor:
        """Crop and resize in the orientation of the file: uint8 ``(channels or more, *size)``."""
        top, left, height, width = box
        reduction = _reduction(self.image, (height, width), size)
        if reduction > 1:
            self.image.draft(None, (self.image.width // reduction, self.image.height // reduction))
            self.image.load()
            x, y, w, h = (side / reduction for side in (left, top, width, height))
            resampling = Image.Resampling[interpolation.upper()]
            small = self.image.resize((size[1], size[0]), resampling, box=(x, y, x + w, y + h))
            return torch.from_numpy(np.array(self._convert(small))).view(*size, -1).permute(2, 0, 1)
        image = self.image
        image.load()
        if image.mode != self.mode or "transparency" in image.info or image.width * image.height * 4 > _ONE_BLOCK:
            image = self._convert(image.crop((left, top, left + width, top + height)))
            top = left = 0
        return _resize(_memory(image)[:, :, top : top + height, left : left + width], size, interpolation)[0]

    def _convert(self, image: Image.Image) -> Image.Image:
        if image.mode.startswith(("I", "F")):
            image = Image.fromarray(self.decoder.to_bytes(np.asarray(image)))
        if self.mode != "RGBA" and (image.mode in _HAS_ALPHA or "transparency" in image.info):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, BACKGROUND), image)
        return image if image.mode == self.mode else image.convert(self.mode)


def open_image(content: bytes) -> Image.Image:
    """Read the header of an image.

    Raises:
        ValueError: the image is too large.
        UnidentifiedImageError, OSError: the format is unknown or the header is damaged.
    """
    try:
        image = Image.open(io.BytesIO(content))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} px exceeds the limit of {MAX_PIXELS / 1e6:.0f} megapixels")
    return image


def _orientation(image: Image.Image) -> int:
    if image.format == "JPEG" and "exif" not in image.info and "xmp" not in image.info:
        return 1  # the usual case, without parsing EXIF tags
    return image.getexif().get(_ORIENTATION, 1)


def _reduction(image: Image.Image, crop: tuple[int, int], size: tuple[int, int]) -> int:
    """Return the factor by which a JPEG can be reduced during decoding and still have twice the target size.

    At twice the target size the result differs from that of the full image by 51 to 54 dB PSNR, which is not
    visible; at exactly the target size by 40 dB, and fine detail is lost.
    """
    if image.format != "JPEG":
        return 1
    largest = min(crop[0] // (2 * size[0]), crop[1] // (2 * size[1]))
    return next((reduction for reduction in (8, 4, 2) if reduction <= largest), 1)


def _memory(image: Image.Image) -> Tensor:
    """Return the memory of a Pillow image, uint8 ``(1, bands, H, W)``, channels last; RGB is stored with four bands."""
    if image.width * image.height * 4 > _ONE_BLOCK:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    else:
        pixels = torch.from_dlpack(pyarrow.array(image).values if image.mode != "L" else pyarrow.array(image))
    return pixels.view(1, image.height, image.width, -1).permute(0, 3, 1, 2)


def to_image(pixels: Tensor) -> Image.Image:
    """Convert uint8 ``(3, H, W)`` to a Pillow image, without an extra copy if the pixels are stored as RGBX."""
    height, width = pixels.shape[1:]
    if pixels.stride() == (1, 4 * width, 4):
        interleaved = pixels.as_strided((height, width, 4), (4 * width, 4, 1))
        return Image.frombytes("RGB", (width, height), interleaved.numpy(), "raw", "RGBX")
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def from_image(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image, uint8 ``(3, H, W)``, sharing its memory."""
    return _memory(image)[0, :3]


def _resize(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize uint8 ``(1, c, H, W)`` with antialiasing; always returns a copy."""
    if tuple(pixels.shape[2:]) == tuple(size):
        return pixels.clone()
    return F.interpolate(pixels, size, mode=interpolation, antialias=True)


def _mirror(pixels: Tensor, dims: list[int]) -> Tensor:
    """Compute ``pixels.flip(dims)`` of ``(c, H, W)``, moving four interleaved channels as one int32."""
    if pixels.shape[0] != 4 or pixels.stride(0) != 1:
        return pixels.flip(dims)
    packed = pixels.permute(1, 2, 0).view(torch.int32)[..., 0].flip(dims)
    return packed[..., None].view(torch.uint8).permute(2, 0, 1)


def _pages(image: Image.Image, count: int) -> np.ndarray:
    pages = []
    for page in range(count):
        image.seek(page)
        pages.append(np.array(image))
    return np.stack(pages)


def _load_npy(content: bytes) -> np.ndarray:
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except MemoryError:
        raise ValueError("the array does not fit into memory") from None


def _load_tiff(content: bytes) -> np.ndarray:
    try:
        import tifffile
    except ImportError:
        raise ValueError("TIFF that Pillow cannot read: pip install 'simmim[tiff]' may be able to read it") from None
    return tifffile.imread(io.BytesIO(content))
