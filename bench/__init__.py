"""Benchmarks: each figure beside its floor, the same work without banger, in the same run.

``python -m bench`` prints a table and writes ``bench/results.json``. One file for each subject.
"""
