"""float16 beside float32, in memory and in words: python -m bench.examples.half_memory gpt2"""

import sys

import model

name = sys.argv[1] if len(sys.argv) > 1 else "tiny-gpt2"
weights, words = {}, {}
for dtype in ("float32", "float16"):
    lm = model.load(name, device="auto", dtype=dtype)
    weights[dtype] = lm.parameters.nbytes
    words[dtype] = lm.generate("In the beginning", temperature=0, max_new_tokens=20).text
    print(f"{dtype}: {weights[dtype] / 1e6:.1f} MB of weights:{words[dtype]!r}")

same = "the same words" if words["float16"] == words["float32"] else "other words"
print(f"float16 takes {weights['float16'] / weights['float32']:.0%} of the memory, and says {same}")
