"""Signals that ask a run to stop: noted, and acted on between steps."""

from __future__ import annotations

import contextlib
import signal


@contextlib.contextmanager
def stop_signals():
    """A list that gets the name of the first SIGTERM, SIGINT or SIGHUP; a second one acts at once.

    One that is ignored stays so, as nohup has it.
    """
    received: list[str] = []

    def note(number, _frame):
        received.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    asking = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {n: signal.signal(n, note) for n in asking if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
