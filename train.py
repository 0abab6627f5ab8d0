#!/usr/bin/env python3
"""Train an image classifier on timm's parts: `timm-sape2 train` from a checkout. `python train.py --help` says how."""

import sys

from timm_sape2.commands.train import main

if __name__ == '__main__':
    sys.exit(main())
