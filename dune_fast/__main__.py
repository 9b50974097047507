"""`python -m dune_fast`, the same as `dune-fast`."""

import sys

from dune_fast.cli import main

sys.exit(main())
