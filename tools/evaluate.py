"""Run ``simmim evaluate`` on several processes: ``accelerate launch tools/evaluate.py EXPORT DATA``."""

import sys

from simmim.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
