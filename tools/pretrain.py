"""Run ``simmim pretrain`` on several processes: ``accelerate launch tools/pretrain.py RECIPE [key.path=value ...]``."""

import sys

from simmim.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
