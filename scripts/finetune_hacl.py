"""Stage 2 for the deepspeed launcher: ``deepspeed scripts/finetune_hacl.py ...`` (see ``--help``)."""

import sys

from hacl_llava.train import main

if __name__ == "__main__":
    sys.exit(main(stage=2))
