"""Run `dylora export` from a source checkout: python tools/export_peft.py RUN --out FOLDER."""

import sys

from dylora_mlx.export import main

if __name__ == "__main__":
    sys.exit(main())
