"""`slicefine` and `python -m slicefine`: the command line. `env` needs the standard library only."""

from __future__ import annotations

import sys


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] == "env":
        from slicefine.cli.env import main as report

        sys.exit(report(arguments[1:]))
    try:
        from slicefine.cli.app import app
    except ImportError as error:
        sys.exit(
            f"slicefine: {error}. The command line needs its extras: pip install"
            " 'slicefine[cli,train]' (slicefine env shows what is there)"
        )
    app()


if __name__ == "__main__":
    main()
