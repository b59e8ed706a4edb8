"""How often a law is tried: a few times in every run, `make laws` thousands of times."""

import os

import pytest
from hypothesis import HealthCheck, settings

LAWS = int(os.environ.get("FTDATA_LAWS", "0"))


def law(times=60, cases=1):
    """Mark a property of masks; of as many examples as `make laws` asks for, each of its `cases` tries its share."""
    examples = -(-LAWS // cases) if LAWS else times
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    tried = settings(max_examples=examples, deadline=None, suppress_health_check=checks)
    return lambda test: pytest.mark.laws(tried(test))
