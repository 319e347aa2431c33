"""Hostile input to the command line: models, files and arguments as an attacker or a broken disk would make them.

`test_hostile.py` runs 2,000 cases, `run.py` any number.
"""
