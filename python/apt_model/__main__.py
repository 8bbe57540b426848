"""`python -m apt_model`: the command `apt-model`."""

import sys

from .commands.main import main

sys.exit(main())
