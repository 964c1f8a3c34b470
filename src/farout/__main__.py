"""`python -m farout` is the command line."""

import sys

from farout.cli import main

sys.exit(main())
