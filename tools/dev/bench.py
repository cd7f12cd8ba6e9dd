"""Print a table of measurements, or make what is measured.

python tools/dev/bench.py TABLE --help
"""

import argparse
import sys
from collections.abc import Sequence

from liar_opt.tools.dev.harness import HERE, parser_of

TABLES = sorted(
    f"{path.parent.name}.{path.stem}" for path in HERE.glob("*/*.py") if "\ndef add_options(" in path.read_text("utf-8")
)
"""Modules that have options and a `main`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of them."""
    modules = {module.rpartition(".")[2].replace("_", "-"): module for module in TABLES}
    parser = argparse.ArgumentParser(prog="bench.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("table", choices=modules)
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the table; see TABLE --help")
    chosen = parser.parse_args(argv)
    module = modules[chosen.table]
    options = parser_of(module).parse_args(chosen.options)
    return sys.modules[f"liar_opt.tools.dev.{module}"].main(options) or 0


if __name__ == "__main__":
    sys.exit(main())
