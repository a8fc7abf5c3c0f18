"""Kills, ranks, damage and full disks, counted: `make torture`. A short version is `tests/test_torture.py`."""
