"""The main job: python run_recbole_raserec.py --model=RaSeRec --dataset=amazon-beauty [--OPTION=VALUE ...]."""

from __future__ import annotations

import sys

from recbole_raserec.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["run", *sys.argv[1:]]))
