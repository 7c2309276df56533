"""`python -m xattn.bench` is the command `xattn bench`, without the imports of the other verbs."""

import sys

from xattn.bench.runner import main
from xattn.config import UsageError

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UsageError as error:
        print(f"xattn bench: {error}", file=sys.stderr)
        sys.exit(2)
