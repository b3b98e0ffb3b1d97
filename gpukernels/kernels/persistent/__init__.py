"""A whole decode step in one cooperative launch: its barrier, its stages, their order, and the launcher.

Start with `schedule.py`; `step.py` says what was measured and what is expected.
"""
