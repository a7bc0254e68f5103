"""Run ``simmim run`` on several processes: ``accelerate launch tools/run.py RECIPE [key.path=value ...]``."""

import sys

from simmim.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
