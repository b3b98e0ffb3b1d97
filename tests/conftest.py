"""Fixtures that several test files share."""

from hub_model import hub, impatient  # noqa: F401
