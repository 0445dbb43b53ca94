"""`python -m dhbe`."""

import sys

from dhbe.cli import main

sys.exit(main())
