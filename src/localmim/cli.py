"""What every command shares: exit codes, one line for a user's mistake, quiet shutdown.

0: done. 2: a wrong argument, config, file or folder. 1: anything else.
"""

from __future__ import annotations

import gc
import sys
from typing import Callable

from localmim.errors import RunError, UserError


def run(main: Callable[[list[str]], object], argv: list[str] | None = None) -> int:
    """Calls `main(argv)` and turns what happened into an exit code; errors of the user are one line on stderr."""
    try:
        main(sys.argv[1:] if argv is None else argv)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr)
        return 1
    finally:
        gc.collect()  # MindSpore's cells complain when they are freed at interpreter exit
