"""Signals of child processes."""

import signal


def default_signals() -> None:
    """In a child, before it begins: jobs in the background of a shell ignore some, and children inherit that."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
