"""Where the tests and the project lie."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
