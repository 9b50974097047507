"""A value that says how it is known."""

from __future__ import annotations

from dataclasses import dataclass

MEASURED, ESTIMATED, GIVEN, COUNTED = "measured", "estimated", "given", "counted"
"""On this machine; from an assumption; by the user; from the configuration, exactly."""


@dataclass(frozen=True)
class Number:
    """A value with its unit."""

    value: float
    unit: str
    how: str
    """MEASURED, ESTIMATED, GIVEN or COUNTED."""

    def __str__(self) -> str:
        size = abs(self.value)
        text = f"{self.value:,.0f}" if size >= 100 or self.value == int(self.value) else f"{self.value:.3g}"
        return f"{text} {self.unit} ({self.how})".replace("  ", " ")
