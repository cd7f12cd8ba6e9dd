"""``python -m liar_opt`` is ``liar-opt``."""

import sys

from liar_opt.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
