"""The command `python -m prospect.encode`. Its code is prospect/vision/encode.py."""

from prospect.errors import run_entry_point
from prospect.vision.encode import main

if __name__ == "__main__":
    run_entry_point(main)
