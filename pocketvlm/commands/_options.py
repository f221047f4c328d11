"""What several commands share."""

from typing import Any


def given(**options: Any) -> dict[str, Any]:
    """Keep the options that were typed; the others have their defaults in the stage's configuration."""
    return {name: value for name, value in options.items() if value is not None}


def names(text: str | None) -> list[str] | None:
    """Split a list separated by commas; None stays None, an empty text is an empty list."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]
