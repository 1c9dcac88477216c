"""`python -m kassa.simulation`."""

import sys

from kassa.simulation.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
