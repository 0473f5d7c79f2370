"""Lets a plain script see what the optimizer says of itself, where nobody has set up logging."""

import logging

__all__ = ["show_banner_logs"]


def show_banner_logs() -> None:
    """Shows this package's INFO lines on stderr: the table of groups and rates, and what is noteworthy about them.

    A program that has set up logging, of its own or for this package, is left as it is.
    """
    package = logging.getLogger(__name__.partition(".")[0])
    if not (package.handlers or package.level or logging.getLogger().handlers):
        package.addHandler(_ScriptHandler())
        package.setLevel(logging.INFO)


class _ScriptHandler(logging.StreamHandler):
    """Writes to stderr while the program has no handlers of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            super().emit(record)
