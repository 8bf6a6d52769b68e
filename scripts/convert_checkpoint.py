"""The entry of `ptdit convert` for those who run scripts: python -m scripts.convert_checkpoint --help"""

import sys

from ptdit_diffusers.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
