"""One file per command of `pocketvlm`; each imports what it needs when it is called."""
