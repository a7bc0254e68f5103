"""Tests of decoding: formats, color modes, orientation, and reduced decoding for crops."""

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
    """Make a smooth photograph-like image from enlarged random colors."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def content(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode_fully(data, decoder=None):
    image = (decoder or Decoder())(data)
    return image.crop((0, 0, *image.size), image.size)


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def psnr(a, b):
    return 10 * math.log10(255**2 / ((a.float() - b.float()) ** 2).mean().item())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("flip", [False, True])
def test_crop_box_refers_to_the_image_after_exif_orientation(orientation, flip):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = content(smooth(60, 90), exif=exif)
    upright = pixels_of(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    image_file = Decoder()(data)
    assert image_file.size == tuple(upright.shape[1:])
    expected = upright[:, 5:35, 9:49]
    expected = expected.flip(-1) if flip else expected
    assert torch.equal(image_file.crop((5, 9, 30, 40), (30, 40), flip=flip), expected)
    half = TensorImage(expected.contiguous()).crop((0, 0, 30, 40), (15, 20))
    assert (image_file.crop((5, 9, 30, 40), (15, 20), flip=flip).int() - half.int()).abs().max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_matches_pillow(interpolation):
    image = smooth(300, 400)
    box = (20, 30, 250, 310)
    ours = Decoder()(content(image)).crop(box, (96, 80), interpolation)
    theirs = image.crop((30, 20, 340, 270)).resize((80, 96), Image.Resampling[interpolation.upper()])
    assert (ours.int() - pixels_of(theirs).int()).abs().max() <= 1


def test_large_jpegs_are_reduced_during_decoding_without_visible_difference():
    data = content(smooth(1500, 2000), "JPEG", quality=92)
    box, size = (100, 200, 1300, 1500), (160, 192)
    image_file = Decoder()(data)
    reduced = image_file.crop(box, size)
    assert image_file.image.size == (
        1000,
        750,
    )  # 1300 px reduced by 2 are at least twice 192 px, reduced by 4 they are not
    full = TensorImage(pixels_of(Image.open(io.BytesIO(data)))).crop(box, size)
    assert psnr(reduced, full) > 50
    small = Decoder()(data)
    small.crop((0, 0, 600, 600), size)
    assert small.image.size == (2000, 1500)


def test_images_larger_than_one_pillow_memory_block():
    image = smooth(2100, 2100)
    ours = Decoder()(content(image, compress_level=1)).crop((10, 20, 2090, 2080), (64, 64))
    assert (ours.int() - TensorImage(pixels_of(image)).crop((10, 20, 2090, 2080), (64, 64)).int()).abs().max() <= 1
    assert torch.equal(decode_fully(content(image, compress_level=1)), pixels_of(image))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_every_color_mode_is_converted_to_the_requested_channels(mode, channels):
    data = content(Image.new(mode, (8, 6), 1), "TIFF")
    assert decode_fully(data, Decoder(channels)).shape == (channels, 6, 8)
    assert Decoder(channels)(data).crop((0, 1, 4, 5), (16, 12)).shape == (channels, 16, 12)


def test_transparent_pixels_show_the_background():
    image = Image.new("RGBA", (8, 6), (200, 10, 10, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 6))
    palette = image.quantize(4)
    for data in (content(image), content(palette, transparency=palette.getpixel((7, 0)))):
        pixels = decode_fully(data)
        assert pixels[:, 0, 0].tolist() == [0, 0, 255]
        assert pixels[:, 0, 7].tolist() == list(BACKGROUND)
    assert decode_fully(content(image), Decoder(4))[:, 0, 7].tolist() == [200, 10, 10, 0]


def test_animations_are_decoded_to_their_first_frame():
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = content(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode_fully(data)[:, 0, 0].tolist() == [255, 0, 0], kind


def test_tiff_pages_are_channels_if_their_number_matches():
    pages = [Image.fromarray(np.full((6, 8), 256 * value, np.uint16)) for value in (10, 20, 30, 40, 50)]
    data = content(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert decode_fully(data, Decoder(5))[:, 0, 0].tolist() == [10, 20, 30, 40, 50]
    assert decode_fully(data, Decoder(1))[:, 0, 0].tolist() == [10]
    with pytest.raises(ValueError, match="expected 6"):
        decode_fully(data, Decoder(6))


@pytest.mark.parametrize("channels_first", [True, False])
def test_arrays_may_have_any_number_of_channels(channels_first):
    array = np.random.default_rng(0).integers(0, 2**16, (13, 6, 8), dtype=np.uint16)
    stored = array if channels_first else array.transpose(1, 2, 0)
    npy, tiff = io.BytesIO(), io.BytesIO()
    np.save(npy, stored)
    tifffile.imwrite(tiff, stored, planarconfig="separate" if channels_first else "contig", photometric="minisblack")
    for data in (npy.getvalue(), tiff.getvalue()):
        assert np.array_equal(decode_fully(data, Decoder(13)).numpy(), array >> 8)
    with pytest.raises(ValueError, match=r"expected 12 channels"):
        decode_fully(npy.getvalue(), Decoder(12))


def test_value_range_maps_high_bit_depth_to_uint8():
    array = np.array([[[-5.0, 0.0, 5.0, 10.0, 20.0, np.nan]]], np.float32)
    npy = io.BytesIO()
    np.save(npy, array)
    assert decode_fully(npy.getvalue(), Decoder(1, (0.0, 10.0))).flatten().tolist() == [0, 0, 128, 255, 255, 0]
    with pytest.raises(ValueError, match=r"data\.value_range"):
        decode_fully(npy.getvalue(), Decoder(1))
    sixteen = content(Image.fromarray(np.full((4, 4), 4095, np.uint16)))
    assert decode_fully(sixteen, Decoder(1, (0, 4095))).unique().tolist() == [255]
    assert decode_fully(sixteen, Decoder(1)).unique().tolist() == [4095 >> 8]
    eight = content(Image.new("L", (4, 4), 100))
    assert decode_fully(eight, Decoder(1, (0, 4095))).unique().tolist() == [100]


def test_pickled_arrays_are_refused():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        Decoder()(file.getvalue())


@pytest.mark.parametrize("data", [b"", b"<html>", b"\xff\xd8\xff\xe0", b"II*\0rubbish"])
def test_content_that_is_not_an_image_raises_with_a_message(data):
    with pytest.raises(Exception, match=r".+"):
        decode_fully(data)


def test_pillow_conversion_round_trip():
    """Both with interleaved RGBX pixels, as decoded files have, and with separate channels."""
    data = content(smooth(30, 40))
    crop = Decoder()(data).crop((2, 3, 20, 30), (10, 12))
    assert crop.stride(0) == 1
    for pixels in (crop, crop.contiguous()):
        image = to_image(pixels)
        assert np.array_equal(np.asarray(image), pixels.permute(1, 2, 0).numpy())
        assert torch.equal(from_image(image), pixels)
