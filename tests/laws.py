"""How often a property is tried: a few times in every run, far more where time is given.

`pytest --hypothesis-profile=nightly` tries ten times as many examples as `ci`, which is the default, `release` two
hundred times as many; `FTDATA_LAWS=N` has each law of masks tried N times, whatever the profile.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

ONCE = 100
PROFILES = {"ci": ONCE, "nightly": 10 * ONCE, "release": 200 * ONCE}
for name, examples in PROFILES.items():
    settings.register_profile(name, max_examples=examples, deadline=None)
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def profile():
    """Examples of a property in the profile that was asked for; what it is, is known when tests are collected."""
    return PROFILES.get(settings.get_current_profile_name(), ONCE)


def often(times=ONCE):
    """Mark a property that is tried so many times in every run."""
    return settings(max_examples=times * profile() // ONCE, deadline=None, suppress_health_check=CHECKS)


def law(times=60, cases=1):
    """Mark a law of masks: each of its `cases` tries its share of what is asked for."""
    asked = int(os.environ.get("FTDATA_LAWS", "0")) or (profile() if profile() > ONCE else 0)
    tried = settings(max_examples=-(-asked // cases) if asked else times, deadline=None, suppress_health_check=CHECKS)
    return lambda test: pytest.mark.laws(tried(test))
