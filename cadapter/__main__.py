"""``python -m cadapter``."""

from __future__ import annotations

from cadapter.cli import main

if __name__ == "__main__":
    main()
