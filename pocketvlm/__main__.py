"""`python -m pocketvlm` is `pocketvlm`."""

from pocketvlm.cli import main

main()
