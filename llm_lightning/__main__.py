"""`python -m llm_lightning` is `llm-lightning`."""

from __future__ import annotations

import sys

from llm_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
