"""Entry point for the deepspeed launcher: ``deepspeed scripts/pretrain_hacl.py ...`` (see ``--help``)."""

import sys

from hacl_llava.train import main

if __name__ == "__main__":
    sys.exit(main())
