"""SimMIM pretraining of Swin Transformer V2 on masked images, and use of the pretrained encoder."""

__version__ = "0.1.0"
