"""`python -m stagecraft` is the `stagecraft` command."""

import sys

from stagecraft.cli import main

sys.exit(main())
