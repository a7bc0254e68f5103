"""`accelerate launch tools/pretrain.py RECIPE [key.path=value ...]`: the same as `simmim pretrain`."""

import sys

from simmim.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
