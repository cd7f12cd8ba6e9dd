"""`--update-golden` writes what the tables look like now, to be read in the diff."""

from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files in tests/tools/golden/")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with a golden file of that name."""
    # pytest reads this file too late for the option when it is started on a folder further up.
    update = request.config.getoption("--update-golden", default=False)

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        text = "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
        if update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"no golden file '{name}'; run: pytest tests/tools --update-golden"
        assert text == path.read_text(encoding="utf-8"), "renew with: pytest tests/tools --update-golden"

    return compare
