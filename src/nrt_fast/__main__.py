"""``python -m nrt_fast``: what torchrun starts."""

import sys

from nrt_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
