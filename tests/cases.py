"""Cases of parametrized tests that only `make test-long` runs, because the other cases run the same code."""

import pytest


def long(*values, **how):
    """Return a case that only `make test-long` runs."""
    return pytest.param(*values, marks=pytest.mark.long, **how)


def mostly_long(cases, *quick):
    """Return these cases. All but the named ones run only in `make test-long`."""
    return [case if case in quick else long(case) for case in cases]
