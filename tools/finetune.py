"""Run ``simmim finetune`` on several processes: ``accelerate launch tools/finetune.py RECIPE --stage NAME``."""

import sys

from simmim.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
