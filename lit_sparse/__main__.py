"""python -m lit_sparse: the same as the console script."""

import sys

from lit_sparse.cli import main

sys.exit(main())
