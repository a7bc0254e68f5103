"""Clips from videos: PyAV decodes the frames of a clip from the nearest key frame, and each frame is cropped.

Shape letters: c channels, T frames of a clip, H W pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simmim.data.decode import Box, Decoder, TensorImage
from simmim.data.transforms import CenterCrop, RandAugmentedCrop, RandomCrop, central_box, stack

MAX_FRAME_PIXELS = 7680 * 4320
"""Limit of the frame size in the header: 8K."""
PIXEL_FORMATS = {1: "gray", 3: "rgb24"}
NO_PROTOCOL = {"protocol_whitelist": "none"}  # a file that is in truth a playlist must not open other files or URLs


@dataclass(frozen=True)
class VideoDecoder(Decoder):
    """Makes a :class:`Video` from the content of a file.

    Args:
        channels: 1 or 3.

    Raises:
        ValueError: any other number of channels, or PyAV is not installed.
    """

    def __post_init__(self) -> None:
        if self.channels not in PIXEL_FORMATS:
            raise ValueError(f"videos have 1 or 3 channels, but the encoder has in_chans={self.channels}")
        _import_av()

    def __call__(self, content: Any) -> Any:
        return Video(content, self.channels)


class Video:
    """A video file whose frames are counted but not yet decoded.

    Frames are identified by the timestamps of the packets, which is exact for constant and variable frame rates.

    Args:
        content: bytes of the file.
        channels: 1 or 3.

    Raises:
        ValueError: damaged, without a frame, or with too large frames; PyAV's errors are ValueErrors or OSErrors too.
    """

    def __init__(self, content: bytes, channels: int = 3) -> None:
        if not content:
            raise ValueError("the file is empty")
        self.content, self.channels = content, channels
        with self._open() as (container, stream):
            self.size: tuple[int, int] = (stream.codec_context.height, stream.codec_context.width)
            self.kind: str = f"{container.format.name} {stream.codec_context.name}"
            if self.size[0] * self.size[1] > MAX_FRAME_PIXELS:
                raise ValueError(f"frames of {self.size[1]} x {self.size[0]} px exceed the 8K limit")
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        timestamps = {packet.dts if packet.pts is None else packet.pts for packet in packets} - {None}
        self.timestamps: list[int] = sorted(timestamps)
        if not self.timestamps:
            raise ValueError("the video has no frames")

    def __len__(self) -> int:
        return len(self.timestamps)

    def crops(
        self,
        frames: Sequence[int],
        boxes: Sequence[Box],
        size: tuple[int, int],
        interpolation: str = "bilinear",
        *,
        flip: bool = False,
    ) -> list[Tensor]:
        """Crop the same frames with every box.

        Args:
            frames: frame indices, in the order of the result.

        Returns:
            One clip per box, uint8 ``(c, T, *size)``.

        Raises:
            ValueError: a frame cannot be decoded, or has another size than the header states.
        """
        wanted = {self.timestamps[index] for index in frames}
        found: dict[int, list[Tensor]] = {}
        for seek in (True, False):  # in some files seeking goes too far: then decode from the beginning
            for timestamp, read_pixels in self._decode(min(wanted), max(wanted), seek=seek):
                if timestamp in wanted and timestamp not in found:
                    frame = TensorImage(read_pixels())
                    if frame.size != self.size:
                        raise ValueError(f"a frame has {frame.size} px (H, W), expected {self.size}")
                    found[timestamp] = [frame.crop(box, size, interpolation, flip=flip) for box in boxes]
            if len(found) == len(wanted):
                break
        else:
            missing = self.timestamps.index(min(wanted - set(found)))
            raise ValueError(f"frame {missing} of {len(self)} cannot be decoded")
        clip = [found[self.timestamps[index]] for index in frames]
        return [torch.stack(crops, dim=1) for crops in zip(*clip, strict=True)]

    def _decode(self, first: int, last: int, *, seek: bool) -> Iterator[tuple[int, Any]]:
        """Yield timestamps, and functions that return the pixels ``(c, H, W)``, from ``first`` or earlier to ``last``.

        Frames come in temporal order.
        """
        with self._open() as (container, stream):
            if seek:
                with suppress(_import_av().FFmpegError):
                    container.seek(first, stream=stream)
            for frame in container.decode(stream):
                timestamp = frame.dts if frame.pts is None else frame.pts
                yield timestamp, lambda frame=frame: self._pixels(frame)
                if timestamp is not None and timestamp >= last:
                    return

    def _pixels(self, frame: Any) -> Tensor:
        pixels = torch.from_numpy(frame.to_ndarray(format=PIXEL_FORMATS[self.channels]))
        return pixels.view(frame.height, frame.width, self.channels).permute(2, 0, 1)

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        with _import_av().open(io.BytesIO(self.content), options=NO_PROTOCOL) as container:
            if not container.streams.video:
                raise ValueError("the file has no video stream")
            stream = container.streams.video[0]
            stream.thread_count = 1  # the loader processes already use all cores
            yield container, stream


class Frames:
    """A decoded video: uint8 ``(c, T, H, W)``."""

    def __init__(self, pixels: Tensor, kind: str = "array") -> None:
        self.pixels, self.kind = pixels, kind
        self.size = (pixels.shape[2], pixels.shape[3])

    def __len__(self) -> int:
        return self.pixels.shape[1]

    def crops(
        self,
        frames: Sequence[int],
        boxes: Sequence[Box],
        size: tuple[int, int],
        interpolation: str = "bilinear",
        *,
        flip: bool = False,
    ) -> list[Tensor]:
        """Crop the same frames with every box, as :meth:`Video.crops`."""
        wanted = self.pixels[:, list(frames)]
        stacked = TensorImage(wanted.flatten(0, 1))  # frames as channels
        crops = [stacked.crop(box, size, interpolation, flip=flip) for box in boxes]
        return [crop.unflatten(0, wanted.shape[:2]) for crop in crops]


class Clip:
    """Some frames of a video, which an image transform crops and flips all in the same way."""

    def __init__(self, video: Video | Frames, frames: Sequence[int]) -> None:
        self.video, self.frames = video, frames
        self.size, self.kind = video.size, video.kind

    def crop(self, box: Box, size: tuple[int, int], interpolation: str = "bilinear", *, flip: bool = False) -> Tensor:
        """Crop and resize all frames to uint8 ``(c, T, *size)``."""
        return self.video.crops(self.frames, [box], size, interpolation, flip=flip)[0]


class RandomClip:
    """Takes a clip from a random position of a video and crops all its frames in the same way.

    A video that is too short is repeated from its beginning.

    Args:
        crop: the image transform for the frames.
        num_frames: frames of the clip.
        stride: distance between frames, in frames of the video (Video Swin, arXiv 2106.13230: 32 frames, stride 2).

    Raises:
        ValueError: counts below 1, or a crop with RandAugment, which works on single images.
    """

    collate = staticmethod(stack)

    def __init__(self, crop: RandomCrop | CenterCrop, num_frames: int, stride: int = 1) -> None:
        _check_positive(num_frames, stride)
        if isinstance(crop, RandAugmentedCrop):
            raise ValueError("RandAugment works on single images: set augment.rand_augment to null for videos")
        self.frame_crop, self.num_frames, self.stride = crop, num_frames, stride
        self.size = crop.size
        self.num_draws = 1 + crop.num_draws

    def __call__(self, video: Video | Frames, draws: Sequence[float]) -> Tensor:
        """Return a clip, uint8 ``(c, T, H, W)``, for ``num_draws`` draws in [0, 1)."""
        first = int(draws[0] * (last_start(len(video), self.num_frames, self.stride) + 1))
        return self._crop_clip(video, first, draws[1:])

    def _crop_clip(self, video: Video | Frames, first: int, draws: Sequence[float]) -> Tensor:
        indices = frame_indices(len(video), first, self.num_frames, self.stride)
        crop: Any = self.frame_crop  # a Clip has the interface of an image
        return crop(Clip(video, indices), draws)


class MiddleClip(RandomClip):
    """Takes the clip in the middle of a video, with a fixed crop: the only view for evaluation during training."""

    def __init__(self, crop: CenterCrop, num_frames: int, stride: int = 1) -> None:
        super().__init__(crop, num_frames, stride)
        self.num_draws = 0

    def __call__(self, video: Video | Frames, draws: Sequence[float]) -> Tensor:
        return self._crop_clip(video, last_start(len(video), self.num_frames, self.stride) // 2, draws)


class Views:
    """Takes several views of a video for evaluation: clips spread over time, each cropped along its longer side.

    The classifier averages their probabilities. Swin V2 uses 4 x 5 views (arXiv 2111.09883, table 5), Video Swin 4 x 3
    (arXiv 2106.13230).

    Args:
        size: ``(H, W)`` of the result in pixels.
        num_frames, stride: see :class:`RandomClip`.
        temporal, spatial: number of clips, and of crops per clip.
    """

    num_draws = 0
    collate = staticmethod(stack)

    def __init__(
        self,
        size: tuple[int, int],
        num_frames: int,
        stride: int = 1,
        *,
        temporal: int = 4,
        spatial: int = 5,
        interpolation: str = "bilinear",
    ) -> None:
        _check_positive(num_frames, stride, temporal, spatial)
        self.size, self.num_frames, self.stride = size, num_frames, stride
        self.temporal, self.spatial, self.interpolation = temporal, spatial, interpolation

    def __call__(self, video: Video | Frames, draws: Sequence[float]) -> Tensor:
        """Return the views, uint8 ``(views, c, T, H, W)``, the crops of the first clip first."""
        boxes = self.boxes(*video.size)
        views: list[Tensor] = []
        for first in evenly_spaced(last_start(len(video), self.num_frames, self.stride), self.temporal):
            indices = frame_indices(len(video), first, self.num_frames, self.stride)
            views += video.crops(indices, boxes, self.size, self.interpolation)
        return torch.stack(views)

    def boxes(self, height: int, width: int) -> list[Box]:
        """Return the largest crops of the target aspect ratio, from one end of the frame to the other."""
        _, _, h, w = central_box(height, width, self.size[1] / self.size[0])
        tops, lefts = evenly_spaced(height - h, self.spatial), evenly_spaced(width - w, self.spatial)
        return [(top, left, h, w) for top, left in zip(tops, lefts, strict=True)]


def last_start(length: int, num_frames: int, stride: int) -> int:
    """Return the last frame at which a clip can begin in a video of ``length`` frames; 0 if the video is too short."""
    return max(0, length - (num_frames - 1) * stride - 1)


def frame_indices(length: int, first: int, num_frames: int, stride: int) -> list[int]:
    """Return the frame indices of a clip, continuing at the first frame after the last one of the video."""
    return [(first + stride * step) % length for step in range(num_frames)]


def evenly_spaced(end: int, count: int) -> list[int]:
    """Return ``count`` integers from 0 to ``end`` in equal steps; a single one lies in the middle."""
    return [round(end * k / (count - 1)) for k in range(count)] if count > 1 else [end // 2]


def _check_positive(*counts: int) -> None:
    if min(counts) < 1:
        raise ValueError(f"frames, stride and views must be at least 1, got {', '.join(map(str, counts))}")


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise ValueError("decoding videos needs PyAV: pip install 'simmim[video]'") from None
    return av
