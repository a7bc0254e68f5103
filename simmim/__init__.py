"""SimMIM pretraining of Swin Transformer V2: masked images in, an encoder that travels out."""

__version__ = "0.1.0"
