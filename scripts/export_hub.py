"""`ptdit export` in a clone that is not installed: python -m scripts.export_hub --output DIR"""

import sys

from ptdit_diffusers.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
