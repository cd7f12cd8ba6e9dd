"""``liar-opt``, and ``python -m liar_opt``, which is the same."""

import sys


def main() -> int:
    """Runs the command; returns its exit code. Ctrl-C while it is loaded says what it says later."""
    try:
        from liar_opt.tools.cli import main as run
    except KeyboardInterrupt:
        print("liar-opt: interrupted; nothing was written", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
