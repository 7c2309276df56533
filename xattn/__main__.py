"""`python -m xattn` is the command `xattn`."""

import sys

from xattn.cli import main

if __name__ == "__main__":
    sys.exit(main())
