"""`accelerate launch tools/run.py RECIPE [key.path=value ...]`: the same as `simmim run`."""

import sys

from simmim.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
