"""`python -m farout` is the command line."""

import sys

from farout.cli import main

if __name__ == "__main__":  # worker processes import this module
    sys.exit(main())
