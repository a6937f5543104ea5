"""The command line: ``s2o``, or ``python -m s2o_compile``."""

from __future__ import annotations

import signal
import sys

from s2o_compile.cli import main as commands


def main() -> None:
    """Run a command. From here on Ctrl-C is an exception, behind which a command leaves no half of a file."""
    try:
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        commands.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
