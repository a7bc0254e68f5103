"""Run the command line as ``python -m simmim``, which ``accelerate launch -m simmim`` can start."""

import sys

from simmim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
