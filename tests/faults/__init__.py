"""Runs that are killed, disks that are full, data that changes: whatever happens, a run goes on to the very same end.

`python -m tests.faults` prints what was done to how many runs. One process imports torch and makes the tiny models
once; each run is a fork of it. No thread of Python's or of a pool runs then, which could hold a lock for ever.
"""
