"""`python -m apt_kernels`: the command `apt-kernels`."""

import sys

from .commands.main import main

if __name__ == "__main__":
    sys.exit(main())
