"""``python -m dmin`` is ``dmin``."""

import sys

from dmin.cli import main

if __name__ == "__main__":
    sys.exit(main())
