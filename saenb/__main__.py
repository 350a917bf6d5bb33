"""`python -m saenb` is the command line."""
import sys

from saenb.cli import main

sys.exit(main())
