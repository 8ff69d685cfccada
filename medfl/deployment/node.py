"""Flower's SuperNode, as a site runs it: `python -m medfl.deployment.node flower-supernode ARGUMENTS`."""

import sys

from medfl.flower_compat import run_supernode

if __name__ == "__main__":
    run_supernode(sys.argv[2:])
