"""Every kind of file to the same kind of pixels, and only as much of it as a crop needs."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from simmim.data import Decoder, TensorImage
from simmim.data.decode import BACKGROUND, from_image, to_image


def smooth(height, width, seed=0):
    """A photograph-like image: coarse colours, enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def content(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def whole(data, decoder=None):
    picture = (decoder or Decoder())(data)
    return picture.crop((0, 0, *picture.size), picture.size)


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def psnr(a, b):
    return 10 * math.log10(255**2 / ((a.float() - b.float()) ** 2).mean().item())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_taken_from_the_image_as_it_is_looked_at(orientation, flip):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = content(smooth(60, 90), exif=exif)
    upright = pixels_of(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    picture = Decoder()(data)
    assert picture.size == tuple(upright.shape[1:])
    expected = upright[:, 5:35, 9:49]
    expected = expected.flip(-1) if flip else expected
    assert torch.equal(picture.crop((5, 9, 30, 40), (30, 40), flip=flip), expected)
    half = TensorImage(expected.contiguous()).crop((0, 0, 30, 40), (15, 20))
    assert (picture.crop((5, 9, 30, 40), (15, 20), flip=flip).int() - half.int()).abs().max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resizing_agrees_with_pillow(interpolation):
    image = smooth(300, 400)
    box = (20, 30, 250, 310)
    ours = Decoder()(content(image)).crop(box, (96, 80), interpolation)
    theirs = image.crop((30, 20, 340, 270)).resize((80, 96), Image.Resampling[interpolation.upper()])
    assert (ours.int() - pixels_of(theirs).int()).abs().max() <= 1


def test_large_jpegs_are_reduced_while_they_are_decoded_and_nobody_sees_it():
    data = content(smooth(1500, 2000), "JPEG", quality=92)
    box, size = (100, 200, 1300, 1500), (160, 192)
    picture = Decoder()(data)
    reduced = picture.crop(box, size)
    assert picture.image.size == (1000, 750)  # 1300 px hold 192 px twice and more at half, not at a quarter
    full = TensorImage(pixels_of(Image.open(io.BytesIO(data)))).crop(box, size)
    assert psnr(reduced, full) > 50
    small = Decoder()(data)
    small.crop((0, 0, 600, 600), size)
    assert small.image.size == (2000, 1500)


def test_images_of_more_than_one_block_of_memory():
    image = smooth(2100, 2100)
    ours = Decoder()(content(image, compress_level=1)).crop((10, 20, 2090, 2080), (64, 64))
    assert (ours.int() - TensorImage(pixels_of(image)).crop((10, 20, 2090, 2080), (64, 64)).int()).abs().max() <= 1
    assert torch.equal(whole(content(image, compress_level=1)), pixels_of(image))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_every_mode_becomes_the_wanted_channels(mode, channels):
    data = content(Image.new(mode, (8, 6), 1), "TIFF")
    assert whole(data, Decoder(channels)).shape == (channels, 6, 8)
    assert Decoder(channels)(data).crop((0, 1, 4, 5), (16, 12)).shape == (channels, 16, 12)


def test_transparency_shows_the_background():
    image = Image.new("RGBA", (8, 6), (200, 10, 10, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 6))
    palette = image.quantize(4)
    for data in (content(image), content(palette, transparency=palette.getpixel((7, 0)))):
        pixels = whole(data)
        assert pixels[:, 0, 0].tolist() == [0, 0, 255]
        assert pixels[:, 0, 7].tolist() == list(BACKGROUND)
    assert whole(content(image), Decoder(4))[:, 0, 7].tolist() == [200, 10, 10, 0]


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = content(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert whole(data)[:, 0, 0].tolist() == [255, 0, 0], kind


def test_pages_of_a_tiff_are_channels_if_there_are_as_many():
    pages = [Image.fromarray(np.full((6, 8), 256 * value, np.uint16)) for value in (10, 20, 30, 40, 50)]
    data = content(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert whole(data, Decoder(5))[:, 0, 0].tolist() == [10, 20, 30, 40, 50]
    assert whole(data, Decoder(1))[:, 0, 0].tolist() == [10]
    with pytest.raises(ValueError, match="expected 6"):
        whole(data, Decoder(6))


@pytest.mark.parametrize("channels_first", [True, False])
def test_arrays_of_any_number_of_channels(channels_first):
    array = np.random.default_rng(0).integers(0, 2**16, (13, 6, 8), dtype=np.uint16)
    stored = array if channels_first else array.transpose(1, 2, 0)
    npy, tiff = io.BytesIO(), io.BytesIO()
    np.save(npy, stored)
    tifffile.imwrite(tiff, stored, planarconfig="separate" if channels_first else "contig", photometric="minisblack")
    for data in (npy.getvalue(), tiff.getvalue()):
        assert np.array_equal(whole(data, Decoder(13)).numpy(), array >> 8)
    with pytest.raises(ValueError, match=r"expected 12 channels"):
        whole(npy.getvalue(), Decoder(12))


def test_a_value_range_says_what_is_black_and_white():
    array = np.array([[[-5.0, 0.0, 5.0, 10.0, 20.0, np.nan]]], np.float32)
    npy = io.BytesIO()
    np.save(npy, array)
    assert whole(npy.getvalue(), Decoder(1, (0.0, 10.0))).flatten().tolist() == [0, 0, 128, 255, 255, 0]
    with pytest.raises(ValueError, match=r"data\.value_range"):
        whole(npy.getvalue(), Decoder(1))
    sixteen = content(Image.fromarray(np.full((4, 4), 4095, np.uint16)))
    assert whole(sixteen, Decoder(1, (0, 4095))).unique().tolist() == [255]
    assert whole(sixteen, Decoder(1)).unique().tolist() == [4095 >> 8]
    eight = content(Image.new("L", (4, 4), 100))
    assert whole(eight, Decoder(1, (0, 4095))).unique().tolist() == [100]


def test_arrays_are_never_unpickled():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        Decoder()(file.getvalue())


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xd8\xff\xe0", b"II*\0rubbish"])
def test_what_is_no_image_is_said_to_be_none(data):
    with pytest.raises(Exception, match=r".+"):
        whole(data)


def test_pixels_go_to_pillow_and_back():
    """Four bytes of a file's pixels at once, or three of any other."""
    data = content(smooth(30, 40))
    crop = Decoder()(data).crop((2, 3, 20, 30), (10, 12))
    assert crop.stride(0) == 1
    for pixels in (crop, crop.contiguous()):
        image = to_image(pixels)
        assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())
        assert torch.equal(from_image(image), pixels)
