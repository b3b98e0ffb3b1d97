"""Attention. `decode.py`: one query a row, over a cache."""
