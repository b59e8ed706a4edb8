"""The number of examples of each Hypothesis property: few by default, many with a larger profile.

The profile `full`, which `make test-long` uses, runs five times as many examples as the default profile `ci`,
`nightly` 30 times and `release` five hundred times as many; `FTDATA_LAWS=N` runs each masking law N times in every profile.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

ONCE = 100
PROFILES = {"ci": ONCE // 5, "full": ONCE, "nightly": 10 * ONCE, "release": 200 * ONCE}
for name, examples in PROFILES.items():
    settings.register_profile(name, max_examples=examples, deadline=None)
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def profile():
    """Return the number of examples of the active profile, which is known when tests are collected."""
    return PROFILES.get(settings.get_current_profile_name(), PROFILES["ci"])


def often(times=ONCE):
    """Return settings for a property with this number of examples in the profile `full`."""
    return settings(max_examples=times * profile() // ONCE, deadline=None, suppress_health_check=CHECKS)


def law(times=60, cases=1):
    """Return a decorator for a masking law; the requested examples are divided among its `cases`."""
    asked = int(os.environ.get("FTDATA_LAWS", "0")) or (profile() if profile() > ONCE else 0)
    times = -(-asked // cases) if asked else times * profile() // ONCE
    tried = settings(max_examples=times, deadline=None, suppress_health_check=CHECKS)
    return lambda test: pytest.mark.laws(tried(test))
