"""Triton's interpreter, for a process that only verifies: twice as fast, stricter, and with products of bfloat16.

That of Triton 3.6 holds bfloat16 as 16-bit integers, and would multiply those; and a masked load that does not say
what stands outside its mask gives 0, where a GPU may give anything.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

#: By Triton's name of the element: how the interpreter holds it (bfloat16 as its bits), and the poison.
_POISON = {
    "fp16": np.float16("nan"),
    "bf16": np.uint16(0x7FC0),
    "fp32": np.float32("nan"),
    "int32": np.int32(2**30),
    "int64": np.int64(2**60),
}


@functools.cache
def adapt() -> None:
    """From now on in this process; the second call does nothing."""
    interpreter._patch_lang = _once(interpreter._patch_lang)
    interpreter._patch_lang_tensor = _counting(interpreter._patch_lang_tensor)
    # Looks for overflow of int32 in every sum, a tenth of the time, where no index can come near it.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    InterpreterBuilder.create_dot = _widened(InterpreterBuilder.create_dot)
    InterpreterBuilder.create_masked_load = _poisoned(InterpreterBuilder.create_masked_load)


def _once(patch_lang):
    """Calls of `@triton.jit` functions exchange `triton.language`'s members, which was half of the time."""
    patched = set()

    def patch(function):
        languages = {id(each) for each in function.__globals__.values() if each is tl or each is tl.core}
        if languages <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages)
        scope = patch_lang(function)
        scope._changes.clear()  # what is not restored stays
        return scope

    return patch


def _counting(patch_tensor):
    """Scalars as bounds of loops: they are arrays of one element, of which NumPy 2.4 and newer make no integer."""

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch


def _widened(create_dot):
    """A product of bfloat16 in float32, as tensor cores make it: products are exact, sums are float32."""

    def dot(self, a, b, *rest):
        return create_dot(self, _float32(a), _float32(b), *rest)

    return dot


def _float32(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _poisoned(create_masked_load):
    def masked_load(self, pointers, mask, other, *rest, **options):
        element = pointers.dtype.element_ty
        # Of a single element the interpreter takes an `other` that is 0 for None.
        if other is None and element.name in _POISON and mask.data.size > 1:
            other = TensorHandle(np.full(mask.data.shape, _POISON[element.name]), element)
        return create_masked_load(self, pointers, mask, other, *rest, **options)

    return masked_load
