"""Videos: exact frames, clips cropped alike, views, and what is broken."""

from __future__ import annotations

import io
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from simmim.data import (
    CenterCrop,
    Images,
    LabelledImages,
    MiddleClip,
    MovingShapes,
    Pixels,
    RandAugmentedCrop,
    RandomClip,
    RandomCrop,
    Video,
    VideoDecoder,
    Views,
    clips,
    evaluation_batches,
    labelled_sources,
    open_files,
    training_batches,
    training_images,
)
from simmim.data.shapes import GRAIN
from tools import paint_clips

av = pytest.importorskip("av")

FIRST, STEP = 8, 6  # brightness of frame n is FIRST + STEP n


def brightness(number: int) -> np.ndarray:
    return np.full((24, 32, 3), FIRST + STEP * number, np.uint8)


def scene(number: int) -> np.ndarray:
    """A still picture with different corners."""
    y, x = np.mgrid[:24, :32]
    return np.stack([y * 10, x * 7, 255 - y * 10], axis=-1).astype(np.uint8)


def write_video(path, count=40, codec="mpeg4", draw=brightness, gop=10) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "bgr0" if codec == "ffv1" else "yuv420p"
        stream.codec_context.gop_size = gop
        stream.bit_rate = 2_000_000
        for number in range(count):
            for packet in stream.encode(av.VideoFrame.from_ndarray(draw(number), format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)


def numbers_in(clip: torch.Tensor) -> list[int]:
    """The numbers of the frames of a clip ``(c, T, H, W)``, read off their brightness."""
    return ((clip.float().mean(dim=(0, 2, 3)) - FIRST) / STEP).round().int().tolist()


def decode_all(content: bytes) -> torch.Tensor:
    """From the first frame to the last, without a seek: ``(c, T, H, W)``."""
    with av.open(io.BytesIO(content)) as file:
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    return torch.stack(frames).permute(3, 0, 1, 2)


def whole(video: Video, frames) -> torch.Tensor:
    return video.crops(frames, [(0, 0, *video.size)], video.size)[0]


KINDS = [
    ("mp4", "mpeg4"),
    ("avi", "mpeg4"),
    ("mp4", "libx264"),
    ("mkv", "libx264"),
    ("mkv", "ffv1"),
    ("mpg", "mpeg1video"),
]
KINDS = [kind for kind in KINDS if kind[1] in av.codecs_available]


@pytest.mark.parametrize(("suffix", "codec"), KINDS)
def test_frames_are_exact_wherever_reading_begins(tmp_path, suffix, codec):
    write_video(tmp_path / f"a.{suffix}", codec=codec)
    content = (tmp_path / f"a.{suffix}").read_bytes()
    everything = decode_all(content)
    video = Video(content)
    assert (len(video), video.size) == (40, (24, 32))
    for frames in ([0], [39], [9, 10, 11], [10], [17, 19, 21, 23], [30, 5, 5, 12]):
        clip = whole(video, frames)
        assert numbers_in(clip) == frames
        assert torch.equal(clip, everything[:, frames])


def test_rates_that_vary_do_not_matter(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(brightness(number), format="rgb24")
            frame.pts = number * 2 if number < 10 else 100 + number * 7
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    content, numbers = (tmp_path / "a.mkv").read_bytes(), [3, 9, 10, 15, 19]
    video = Video(content)
    assert len(video) == 20 and torch.equal(whole(video, numbers), decode_all(content)[:, numbers])


def test_a_clip_has_frames_a_stride_apart_from_anywhere(tmp_path):
    write_video(tmp_path / "a.mp4")
    video = Video((tmp_path / "a.mp4").read_bytes())
    transform = RandomClip(CenterCrop((8, 8)), num_frames=4, stride=3)
    assert transform.num_draws == 1 and transform.size == (8, 8)
    clip = transform(video, [0.0])
    assert (clip.shape, clip.dtype) == ((3, 4, 8, 8), torch.uint8)
    assert numbers_in(clip) == [0, 3, 6, 9]
    assert numbers_in(transform(video, [0.9999])) == [30, 33, 36, 39]
    firsts = {numbers_in(transform(video, [(n + 0.5) / 31]))[0] for n in range(31)}
    assert firsts == set(range(31))
    assert numbers_in(MiddleClip(CenterCrop((8, 8)), 4, 3)(video, [])) == [15, 18, 21, 24]


def test_a_short_video_begins_again(tmp_path):
    write_video(tmp_path / "a.mp4", count=3)
    video = Video((tmp_path / "a.mp4").read_bytes())
    assert numbers_in(RandomClip(CenterCrop((8, 8)), 5, 2)(video, [0.7])) == [0, 2, 1, 0, 2]
    assert numbers_in(MiddleClip(CenterCrop((8, 8)), 4, 1)(video, [])) == [0, 1, 2, 0]


def test_all_frames_are_cropped_and_flipped_as_one_picture(tmp_path):
    write_video(tmp_path / "a.mkv", count=6, codec="ffv1", draw=scene)
    video = Video((tmp_path / "a.mkv").read_bytes())
    picture = Pixels(whole(video, [0])[:, 0])
    crop = RandomCrop((10, 12), scale=(0.2, 0.8))
    transform = RandomClip(crop, num_frames=3)
    assert transform.num_draws == crop.num_draws + 1
    for seed in range(6):
        draws = torch.rand(transform.num_draws, generator=torch.Generator().manual_seed(seed)).tolist()
        clip = transform(video, draws)
        for frame in clip.unbind(dim=1):
            assert torch.equal(frame, crop(picture, draws[1:]))


def test_views_are_spread_over_time_and_the_longer_side(tmp_path):
    write_video(tmp_path / "a.mp4")
    video = Video((tmp_path / "a.mp4").read_bytes())
    views = Views((12, 12), num_frames=2, stride=4)
    found = views(video, [])
    assert found.shape == (20, 3, 2, 12, 12)
    starts = [0, 12, 23, 35]
    assert [numbers_in(view) for view in found] == [[first, first + 4] for first in starts for _ in range(5)]
    assert views.boxes(24, 32) == [(0, left, 24, 24) for left in (0, 2, 4, 6, 8)]
    assert Views((12, 12), 2, spatial=3).boxes(32, 24) == [(top, 0, 24, 24) for top in (0, 4, 8)]
    assert Views((12, 12), 2, spatial=1).boxes(32, 24) == [(4, 0, 24, 24)]
    assert views.collate([found, found])["image"].shape == (2, 20, 3, 2, 12, 12)
    write_video(tmp_path / "b.mkv", codec="ffv1", count=2, draw=scene)
    video = Video((tmp_path / "b.mkv").read_bytes())
    left, right = Views((24, 24), 1, temporal=1, spatial=2)(video, [])[:, :, 0]
    picture = whole(video, [0])[:, 0]
    assert torch.equal(left, picture[:, :, :24]) and torch.equal(right, picture[:, :, 8:])


def test_the_folders_of_kinetics(tmp_path):
    for part in ("train", "val"):
        for label in ("zumba", "abseiling"):
            for number in range(3 if part == "train" else 1):
                write_video(tmp_path / part / label / f"{label[0]}{number}.mp4", count=4)
    training, validation = labelled_sources(tmp_path, VideoDecoder(), validation_images=0)
    assert list(training.classes) == ["abseiling", "zumba"] and (len(training), len(validation)) == (6, 2)
    unlabelled, _ = training_images(tmp_path, VideoDecoder(1), validation_images=0)
    transform = RandomClip(RandomCrop((8, 8)), num_frames=2)
    batches = training_batches(
        training, transform, seed=0, labelled=True, num_workers=1, batch_size=3, micro_batch_size=3, end_step=2
    )
    for batch in batches:
        assert (batch["image"].shape, batch["image"].dtype) == ((3, 3, 2, 8, 8), torch.uint8)
        names = [training.name(number) for number in batch["index"].tolist()]
        assert all(training.classes[k] in name for k, name in zip(batch["label"].tolist(), names, strict=True))
    assert len(unlabelled) == 6
    (batch,) = evaluation_batches(validation, Views((8, 8), 2, temporal=2, spatial=3), batch_size=2, labelled=True)
    assert batch["image"].shape == (2, 6, 3, 2, 8, 8)


def test_lists_of_paths_and_of_kinetics(tmp_path):
    for name in ("x/vid-eo_0001_000010_000020.mp4", "y/plain.mp4"):
        write_video(tmp_path / name, count=2)
    (tmp_path / "plain.csv").write_text("x/vid-eo_0001_000010_000020.mp4,one\ny/plain.mp4,two\n")
    (tmp_path / "named.csv").write_text("label,video\none,y/plain.mp4\n")
    (tmp_path / "train.csv").write_text(
        'label,youtube_id,time_start,time_end,split\n"shot put",vid-eo_0001,10,20,train\njuggling,gone,5,15,train\n'
    )
    (tmp_path / "none.csv").write_text("label,youtube_id,time_start,time_end,split\na,b,5,15,train\n")
    plain = LabelledImages(open_files(tmp_path / "plain.csv"), VideoDecoder())
    assert [plain.classes[plain.label(number)] for number in range(2)] == ["one", "two"]
    assert open_files(tmp_path / "named.csv").labels().to_pylist() == ["one"]
    kinetics = LabelledImages(open_files(tmp_path / "train.csv"), VideoDecoder())
    assert [kinetics.classes[kinetics.label(number)] for number in range(2)] == ["shot put", "juggling"]
    assert numbers_in(whole(kinetics.decode(kinetics.fetch(0)), [0, 1])) == [0, 1]
    batches = evaluation_batches(kinetics, MiddleClip(CenterCrop((8, 8)), 2), batch_size=2, labelled=True)
    assert [batch["index"].tolist() for batch in batches] == [[0]]
    assert batches.corrupt == {str(tmp_path / "gone_000005_000015.mp4"): "No such file or directory"}
    with pytest.raises(ValueError, match=r"none of the 1 videos of .*none.csv are in .* expected files called"):
        open_files(tmp_path / "none.csv")


def test_what_is_broken_is_named_and_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a list of files would find them
    for number in range(3):
        write_video(tmp_path / f"good{number}.mp4", count=6)
    write_video(tmp_path / "cut.mp4", count=30, codec="mpeg4")
    content = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile good0.mp4\n")
    with av.open(str(tmp_path / "sound.mkv"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 400), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        file.mux(stream.encode(frame))
    with av.open(str(tmp_path / "frameless.avi"), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height = 32, 24
        file.start_encoding()
    source = Images(open_files(tmp_path), VideoDecoder())
    transform = MiddleClip(CenterCrop((8, 8)), 4)
    batches = evaluation_batches(source, transform, batch_size=9)
    (batch,) = batches
    good = [number for number in range(len(source)) if "good" in source.name(number)]
    assert batch["index"].tolist() == good
    reasons = {name.removeprefix(f"{tmp_path}/"): reason for name, reason in batches.corrupt.items()}
    assert set(reasons) == {"cut.mp4", "empty.mp4", "text.mp4", "list.mp4", "sound.mkv", "frameless.avi"}
    assert reasons["empty.mp4"] == "the file is empty"
    assert reasons["sound.mkv"] == "a file without a video in it"
    trained = training_batches(source, transform, seed=0, batch_size=9, micro_batch_size=9, end_step=1)
    (batch,) = trained
    assert batch["image"].shape == (9, 3, 4, 8, 8) and {name for name, _ in batch["corrupt"]} >= set(batches.corrupt)


def test_of_a_video_that_is_cut_short_there_is_what_is_left(tmp_path):
    write_video(tmp_path / "a.mkv", codec="ffv1", count=20, draw=scene)
    content = (tmp_path / "a.mkv").read_bytes()
    video = Video(content[: len(content) * 3 // 4])
    assert 10 < len(video) < 20 and torch.equal(*whole(video, [0, 9]).unbind(dim=1))


class Watched:
    """A container that counts decoded frames, and may seek beyond what is sought."""

    def __init__(self, container, decoded: list[int], too_far: int) -> None:
        self.container, self.decoded, self.too_far = container, decoded, too_far

    def __getattr__(self, name):
        return getattr(self.container, name)

    def seek(self, stamp, stream) -> None:
        self.container.seek(stamp + self.too_far, stream=stream)

    def decode(self, stream):
        for frame in self.container.decode(stream):
            self.decoded.append(frame.pts)
            yield frame


@pytest.mark.parametrize("too_far", [0, 15])
def test_decoding_begins_at_a_key_frame_before_or_at_the_first_one(tmp_path, monkeypatch, too_far):
    write_video(tmp_path / "a.mkv", codec="ffv1", gop=10)
    video = Video((tmp_path / "a.mkv").read_bytes())
    decoded: list[int] = []
    opened = Video._opened

    @contextmanager
    def watched(self):
        with opened(self) as (container, stream):
            yield Watched(container, decoded, too_far * (video.stamps[1] - video.stamps[0])), stream

    monkeypatch.setattr(Video, "_opened", watched)
    assert numbers_in(whole(video, [15, 17])) == [15, 17]
    assert len(decoded) <= 8 if not too_far else len(decoded) >= 18


def test_a_frame_that_is_not_there_is_an_error_and_not_another_frame(tmp_path):
    write_video(tmp_path / "a.mp4")
    video = Video((tmp_path / "a.mp4").read_bytes())
    video.stamps.insert(5, video.stamps[5] - 1)
    with pytest.raises(ValueError, match="frame 5 of 41 cannot be decoded"):
        whole(video, [4, 5])


def test_bombs_are_refused_by_the_header(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", count=2)
    monkeypatch.setattr(clips, "MAX_FRAME_PIXELS", 700)
    with pytest.raises(ValueError, match="frames of 32 x 24 px, more than"):
        Video((tmp_path / "a.mp4").read_bytes())


def test_what_cannot_be_is_said_at_the_start(tmp_path, monkeypatch):
    write_video(tmp_path / "a" / "a.mp4", count=2)
    (tmp_path / "b").mkdir()
    np.save(tmp_path / "b" / "b.npy", np.zeros((3, 9, 9), np.uint8))
    with pytest.raises(ValueError, match=r"wanted are images, but .*a.mp4 is one of 1 videos"):
        Images(open_files(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"wanted are videos, but .*b.npy is one of 1 images"):
        Images(open_files(tmp_path / "b"), VideoDecoder())
    with pytest.raises(ValueError, match="1 or 3 channels, but the encoder wants in_chans=4"):
        VideoDecoder(4)
    with pytest.raises(ValueError, match="must be at least 1, got 0, 1"):
        RandomClip(CenterCrop((8, 8)), 0)
    with pytest.raises(ValueError, match="is for images, not for clips"):
        RandomClip(RandAugmentedCrop((8, 8), rand_augment="rand-m9", mean=[0.5] * 3), 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install 'simmim\[video\]'"):
        VideoDecoder()


def test_shapes_move_in_front_of_what_stands_still():
    shapes, background = MovingShapes(2, (24, 24)), torch.full((3, 24, 24), 0.5)
    video, inside = shapes.paint(1, background)
    assert (video.shape, inside.shape) == ((3, 16, 24, 24), (16, 24, 24)) and torch.equal(shapes.paint(1)[1], inside)
    assert 0.2 < inside.float().mean() < 0.9 and not torch.equal(inside[0], inside[15])
    outside = (video / 255 - 0.5).abs().amax(dim=0)[~inside]
    assert outside.max() < GRAIN + 0.01


def test_painted_clips(tmp_path):
    for out in ("a", "b"):
        paint_clips.main([str(tmp_path / out), "--videos", "40", "--val-videos", "9"])
    contents = [[file.read_bytes() for file in sorted((tmp_path / out).rglob("*.avi"))] for out in ("a", "b")]
    assert contents[0] == contents[1] and len(set(contents[0])) == 49
    training, validation = labelled_sources(tmp_path / "a", VideoDecoder(), 1)
    assert (len(training), len(validation), len(training.classes)) == (40, 9, 8)
    shapes = MovingShapes(40, (24, 24))
    for number in range(40):
        painted = int(Path(training.name(number)).stem)
        assert training.classes[training.label(number)] == shapes.classes[shapes.label(painted)].replace(", ", "_")
    video, inside = shapes.paint(painted)
    seen = whole(training.decode(training.fetch(number)), range(16))
    inner = inside.expand_as(video)
    assert (seen.int() - video)[inner].abs().float().mean() < 4  # what JPEG leaves of it
