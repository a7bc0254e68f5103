"""Videos -> clips: the frames that are wanted, decoded by PyAV from the nearest key frame, cropped one by one.

Letters: c channels, T frames of a clip, H W pixels.
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
"""Larger frames are refused by the header: 8K."""
FORMATS = {1: "gray", 3: "rgb24"}
NO_PROTOCOL = {"protocol_whitelist": "none"}  # what claims to be a video but is a list of addresses opens none of them


@dataclass(frozen=True)
class VideoDecoder(Decoder):
    """What makes a :class:`Video` of the content of a file, in place of a picture.

    Args:
        channels: 1 or 3.

    Raises:
        ValueError: other channels, or PyAV is missing.
    """

    def __post_init__(self) -> None:
        if self.channels not in FORMATS:
            raise ValueError(f"videos have 1 or 3 channels, but the encoder wants in_chans={self.channels}")
        _av()

    def __call__(self, content: Any) -> Any:
        return Video(content, self.channels)


class Video:
    """A video whose frames are counted, none of them decoded yet.

    Frames are found by the time stamps that the packets of the file bear, which holds at any and at varying rates.

    Args:
        content: of the file.
        channels: 1 or 3.

    Raises:
        ValueError: damaged, without a frame, or with frames that are too large; PyAV's errors are ValueErrors or
            OSErrors too.
    """

    def __init__(self, content: bytes, channels: int = 3) -> None:
        if not content:
            raise ValueError("the file is empty")
        self.content, self.channels = content, channels
        with self._opened() as (container, stream):
            self.size: tuple[int, int] = (stream.codec_context.height, stream.codec_context.width)
            self.kind: str = f"{container.format.name} {stream.codec_context.name}"
            if self.size[0] * self.size[1] > MAX_FRAME_PIXELS:
                raise ValueError(f"frames of {self.size[1]} x {self.size[0]} px, more than 8K: a bomb?")
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        stamps = {packet.dts if packet.pts is None else packet.pts for packet in packets} - {None}
        self.stamps: list[int] = sorted(stamps)
        if not self.stamps:
            raise ValueError("a video without a frame")

    def __len__(self) -> int:
        return len(self.stamps)

    def crops(
        self,
        frames: Sequence[int],
        boxes: Sequence[Box],
        size: tuple[int, int],
        interpolation: str = "bilinear",
        *,
        flip: bool = False,
    ) -> list[Tensor]:
        """Of every box a clip, uint8 ``(c, T, *size)``: the frames of these numbers, in this order.

        Raises:
            ValueError: a frame that cannot be decoded, or of another size than the header says.
        """
        wanted = {self.stamps[number] for number in frames}
        found: dict[int, list[Tensor]] = {}
        for seek in (True, False):  # some files lead past what is sought: then all is decoded
            for stamp, pixels in self._decoded(min(wanted), max(wanted), seek=seek):
                if stamp in wanted and stamp not in found:
                    picture = TensorImage(pixels())
                    if picture.size != self.size:
                        raise ValueError(f"a frame of {picture.size}, expected {self.size} (H, W)")
                    found[stamp] = [picture.crop(box, size, interpolation, flip=flip) for box in boxes]
            if len(found) == len(wanted):
                break
        else:
            missing = self.stamps.index(min(wanted - set(found)))
            raise ValueError(f"frame {missing} of {len(self)} cannot be decoded")
        clip = [found[self.stamps[number]] for number in frames]
        return [torch.stack(crops, dim=1) for crops in zip(*clip, strict=True)]

    def _decoded(self, first: int, last: int, *, seek: bool) -> Iterator[tuple[int, Any]]:
        """Stamps and what gives the pixels ``(c, H, W)``, in order of time, from before ``first`` to ``last``."""
        with self._opened() as (container, stream):
            if seek:
                with suppress(_av().FFmpegError):
                    container.seek(first, stream=stream)
            for frame in container.decode(stream):
                stamp = frame.dts if frame.pts is None else frame.pts
                yield stamp, lambda frame=frame: self._pixels(frame)
                if stamp is not None and stamp >= last:
                    return

    def _pixels(self, frame: Any) -> Tensor:
        pixels = torch.from_numpy(frame.to_ndarray(format=FORMATS[self.channels]))
        return pixels.view(frame.height, frame.width, self.channels).permute(2, 0, 1)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        with _av().open(io.BytesIO(self.content), options=NO_PROTOCOL) as container:
            if not container.streams.video:
                raise ValueError("a file without a video in it")
            stream = container.streams.video[0]
            stream.thread_count = 1  # workers share the cores among themselves
            yield container, stream


class Frames:
    """A video that is decoded already: uint8 ``(c, T, H, W)``."""

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
        """As of :class:`Video`."""
        wanted = self.pixels[:, list(frames)]
        picture = TensorImage(wanted.flatten(0, 1))  # frames as channels
        crops = [picture.crop(box, size, interpolation, flip=flip) for box in boxes]
        return [crop.unflatten(0, wanted.shape[:2]) for crop in crops]


class Clip:
    """Some frames of a video, to be cropped as one picture: the same box and flip in all of them."""

    def __init__(self, video: Video | Frames, frames: Sequence[int]) -> None:
        self.video, self.frames = video, frames
        self.size, self.kind = video.size, video.kind

    def crop(self, box: Box, size: tuple[int, int], interpolation: str = "bilinear", *, flip: bool = False) -> Tensor:
        """uint8 ``(c, T, *size)``"""
        return self.video.crops(self.frames, [box], size, interpolation, flip=flip)[0]


class RandomClip:
    """Frames ``stride`` apart from a random place of a video, cropped alike.

    A video that is too short begins again.

    Args:
        crop: of a picture; its draws hold for all frames.
        num_frames: of the clip.
        stride: from one to the next, in frames of the video (Video Swin, arXiv 2106.13230: 32 frames, 2).

    Raises:
        ValueError: numbers below 1, or a crop that paints on single images.
    """

    collate = staticmethod(stack)

    def __init__(self, crop: RandomCrop | CenterCrop, num_frames: int, stride: int = 1) -> None:
        _check(num_frames, stride)
        if isinstance(crop, RandAugmentedCrop):
            raise ValueError("RandAugment paints on single images: leave augment.rand_augment out for videos")
        self.picture_crop, self.num_frames, self.stride = crop, num_frames, stride
        self.size = crop.size
        self.num_draws = 1 + crop.num_draws

    def __call__(self, video: Video | Frames, draws: Sequence[float]) -> Tensor:
        """uint8 ``(c, T, H, W)``; ``num_draws`` draws in [0, 1)."""
        first = int(draws[0] * (room(len(video), self.num_frames, self.stride) + 1))
        return self._at(video, first, draws[1:])

    def _at(self, video: Video | Frames, first: int, draws: Sequence[float]) -> Tensor:
        numbers = frame_numbers(len(video), first, self.num_frames, self.stride)
        # A clip is cropped as a picture is.
        crop: Any = self.picture_crop
        return crop(Clip(video, numbers), draws)


class MiddleClip(RandomClip):
    """The clip in the middle of a video, cropped by a fixed crop: the one view of evaluation while training."""

    def __init__(self, crop: CenterCrop, num_frames: int, stride: int = 1) -> None:
        super().__init__(crop, num_frames, stride)
        self.num_draws = 0

    def __call__(self, video: Video | Frames, draws: Sequence[float]) -> Tensor:
        return self._at(video, room(len(video), self.num_frames, self.stride) // 2, draws)


class Views:
    """What a video is judged by: clips spread over its time, and of each the crops along its longer side.

    The classifier gives the mean of their probabilities. Swin V2 has 4 x 5 views (arXiv 2111.09883, table 5),
    Video Swin 4 x 3 (arXiv 2106.13230).

    Args:
        size: ``(H, W)`` of the result in pixels.
        num_frames, stride: as of :class:`RandomClip`.
        temporal, spatial: how many clips, and crops of each.
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
        _check(num_frames, stride, temporal, spatial)
        self.size, self.num_frames, self.stride = size, num_frames, stride
        self.temporal, self.spatial, self.interpolation = temporal, spatial, interpolation

    def __call__(self, video: Video | Frames, draws: Sequence[float]) -> Tensor:
        """uint8 ``(views, c, T, H, W)``, the crops of the first clip first."""
        boxes = self.boxes(*video.size)
        views: list[Tensor] = []
        for first in spread(room(len(video), self.num_frames, self.stride), self.temporal):
            numbers = frame_numbers(len(video), first, self.num_frames, self.stride)
            views += video.crops(numbers, boxes, self.size, self.interpolation)
        return torch.stack(views)

    def boxes(self, height: int, width: int) -> list[Box]:
        """The largest crops of the wanted aspect ratio, from one end to the other."""
        _, _, h, w = central_box(height, width, self.size[1] / self.size[0])
        places = zip(spread(height - h, self.spatial), spread(width - w, self.spatial), strict=True)
        return [(top, left, h, w) for top, left in places]


def room(length: int, num_frames: int, stride: int) -> int:
    """The last frame that a clip of a video of so many frames can begin with; 0 if it is too short for one."""
    return max(0, length - (num_frames - 1) * stride - 1)


def frame_numbers(length: int, first: int, num_frames: int, stride: int) -> list[int]:
    """The frames of a clip; after the last of the video comes its first again."""
    return [(first + stride * number) % length for number in range(num_frames)]


def spread(end: int, count: int) -> list[int]:
    """So many whole numbers from 0 to ``end`` in equal steps; a single one lies in the middle."""
    return [round(end * k / (count - 1)) for k in range(count)] if count > 1 else [end // 2]


def _check(*counts: int) -> None:
    if min(counts) < 1:
        raise ValueError(f"frames, stride and views must be at least 1, got {', '.join(map(str, counts))}")


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ValueError("videos are decoded by PyAV: pip install 'simmim[video]'") from None
    return av
