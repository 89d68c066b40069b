"""`python -m spalf`: the command line."""

from __future__ import annotations

from spalf.cli import main

if __name__ == "__main__":
    main()
