"""Text as it is made: python -m bench.examples.stream gpt2 "In the beginning" """

import sys

import model

name = sys.argv[1] if len(sys.argv) > 1 else "tiny-gpt2"
prompt = sys.argv[2] if len(sys.argv) > 2 else "In the beginning"

lm = model.load(name, device="auto", dtype="auto")  # the Triton kernels on a GPU, NumPy without one
print(prompt, end="", flush=True)
for piece in lm.stream(prompt, max_new_tokens=40, temperature=0.8, top_p=0.95, seed=1):
    print(piece, end="", flush=True)
print()
