"""`python -m cloche` and the command `cloche`."""

import sys

from cloche import start


def main() -> None:
    start.calm_threads()
    start.tune_allocator()
    from cloche.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
