"""`python -m paramwatch`: the command line."""

import sys

from paramwatch.cli import main

sys.exit(main())
