"""Run the command line: ``python -m simmim`` is the same as ``simmim``, and can be started by ``accelerate launch -m``."""

import sys

from simmim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
