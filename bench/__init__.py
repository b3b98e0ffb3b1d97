"""Measurements: `python -m bench.NAME`, each of which checks the answer before it prints a speed."""
