"""The findings of an audit, and their form in SARIF and in GitHub annotations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote

from ftdata.errors import escape_unprintable
from ftdata.inspection.row_views import to_single_line
from ftdata.spelling import spell_options
from ftdata.types import Source

MAX_LOCATIONS = 10
"""The number of rows that a finding lists."""

PRINTED_LOCATIONS, INDENT = 5, "    "
"""The number of rows of a finding that are printed, and the indentation of its lines."""


class FindingLocation(NamedTuple):
    """A row in which a check found a problem.

    Attributes:
        source: The row.
        detail: The value that was found in the row.
    """

    source: Source
    detail: str = ""


@dataclass
class Finding:
    """A problem that a check found: its description, the number of affected rows, and the first affected rows.

    Attributes:
        code: The code of the check, or the error code of rejected rows.
        severity: `"error"`, `"warning"` or `"note"`.
        message: A description of the problem.
        fix: The fix, in the imperative.
        count: The number of affected rows.
        locations: The first ten affected rows.
    """

    code: str
    severity: str
    message: str
    fix: str
    count: int = 0
    locations: list[FindingLocation] = field(default_factory=list)

    def add(self, source: Source | None, detail: str = "") -> None:
        """Add an affected row to the finding.

        Pass `None` as `source` if the problem does not belong to a row.
        """
        self.count += 1
        if len(self.locations) < MAX_LOCATIONS and source is not None:
            self.locations.append(FindingLocation(source, detail))

    @property
    def where(self) -> list[str]:
        """The locations of the first affected rows, such as `data.jsonl:7`."""
        return [str(location.source) for location in self.locations]

    def as_dict(self) -> dict[str, Any]:
        """Convert the finding to a JSON-serializable dictionary."""
        return {
            "code": self.code,
            "severity": self.severity,
            "says": self.message,
            "fix": self.fix,
            "count": self.count,
            "where": self.where,
            "places": [{**location.source._asdict(), "says": location.detail} for location in self.locations],
        }

    def __str__(self) -> str:
        rows = f"{self.count:,} × " if self.locations else ""
        lines = [f"{rows}{self.message}"]
        lines += [
            to_single_line(f"{location.source}{f': {location.detail}' if location.detail else ''}")
            for location in self.locations[:PRINTED_LOCATIONS]
        ]
        if self.locations and self.count > PRINTED_LOCATIONS:
            lines.append(f"and {self.count - PRINTED_LOCATIONS:,} more")
        lines.append(f"Fix: {spell_options(self.fix)}")
        return "\n".join([f"{self.severity} {self.code}", *(f"{INDENT}{line}" for line in lines)])


def describe_location(finding: Finding, location: FindingLocation | None) -> str:
    """Return one line about a finding in a row."""
    count = f" ({finding.count:,} rows)" if finding.count > 1 else ""
    row = f"row {location.source.row}" if location and location.source.line is None else ""
    detail = ", ".join(filter(None, (row, location.detail if location else "")))
    return f"{finding.message}{count}{f': {detail}' if detail else ''}. Fix: {finding.fix}"


def make_sarif_location(source: Source) -> dict[str, Any]:
    """Return the place of a row in SARIF."""
    uri = quote(source.path.replace("\\", "/"), safe="/:", errors="surrogateescape")
    location: dict[str, Any] = {"artifactLocation": {"uri": uri}}
    if source.line is not None:
        location["region"] = {"startLine": source.line}
    return {"physicalLocation": location}


def escape_command(text: str, reserved: str = "") -> str:
    """Escape special characters in a value of a GitHub workflow command."""
    text = escape_unprintable(text)
    for char in ("%", "\r", "\n", *reserved):
        text = text.replace(char, f"%{ord(char):02X}")
    return text
