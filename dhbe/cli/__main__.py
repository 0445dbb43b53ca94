"""`python -m dhbe.cli`."""

import sys

from dhbe.cli import main

sys.exit(main())
