from prospect.errors import run_entry_point
from prospect.report import main

run_entry_point(main)
