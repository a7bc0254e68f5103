"""Swin Transformer encoders for images of any size and for videos, independent of masking, recipes and training."""

from importlib.metadata import PackageNotFoundError, version

from swin.config import SIZES, SwinConfig, make_config
from swin.encoder import SwinEncoder, make_encoder
from swin.inflation import inflate
from swin.video import VideoConfig, VideoEncoder
from swin.weights.import_weights import import_encoder
from swin.weights.serialization import load_description, load_encoder, save_encoder
from swin.weights.transfer import transfer

try:
    __version__ = version("simmim")  # the distribution that contains this package
except PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "unknown"

__all__ = [
    "SIZES",
    "SwinConfig",
    "SwinEncoder",
    "VideoConfig",
    "VideoEncoder",
    "import_encoder",
    "inflate",
    "load_description",
    "load_encoder",
    "make_config",
    "make_encoder",
    "save_encoder",
    "transfer",
]
