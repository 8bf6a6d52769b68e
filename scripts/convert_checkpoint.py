"""`ptdit convert` in a clone that is not installed: python -m scripts.convert_checkpoint --help"""

import sys

from ptdit_diffusers.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
