"""Attention in the FlashAttention style: `forward.py`, then `backward.py`; `blocks.py` is what they share."""
