"""Swin Transformer encoders for any image size. Knows nothing of masking, recipes or training."""

from swin.config import SIZES, SwinConfig, make_config
from swin.encoder import SwinEncoder, make_encoder
from swin.importing import import_encoder
from swin.transfer import transfer
from swin.weights import load_description, load_encoder, save_encoder

__all__ = [
    "SIZES",
    "SwinConfig",
    "SwinEncoder",
    "import_encoder",
    "load_description",
    "load_encoder",
    "make_config",
    "make_encoder",
    "save_encoder",
    "transfer",
]
