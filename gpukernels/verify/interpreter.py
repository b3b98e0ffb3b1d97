"""Triton's interpreter, for a process that only verifies: four times as fast, stricter, and with products of bfloat16.

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
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    tl.block_type.__init__ = _shaped_once(tl.block_type.__init__)
    tl.tensor.__init__ = _sized_once(tl.tensor.__init__)
    # Looks for overflow of int32 in every sum, a tenth of the time, where no index can come near it.
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    InterpreterBuilder.create_dot = _widened(InterpreterBuilder.create_dot)
    InterpreterBuilder.create_masked_load = _poisoned(InterpreterBuilder.create_masked_load)


def _once(patch_lang):
    """Calls of `@triton.jit` functions exchange `triton.language`'s members, which was half of the time."""
    modules, patched = set(), set()

    def patch(function):
        scope, module = interpreter._LangPatchScope(), id(function.__globals__)
        if module in modules:
            return scope
        modules.add(module)
        languages = {id(each) for each in function.__globals__.values() if each is tl or each is tl.core}
        if languages <= patched:
            return scope
        patched.update(languages)
        scope = patch_lang(function)
        scope._changes.clear()  # what is not restored stays
        return scope

    return patch


def _by_name(np_dtype):
    """It fills a dictionary of all dtypes to look one up."""
    found = {}

    def look_up(dtype):
        known = found.get(dtype.name)
        if known is None:
            known = found[dtype.name] = np_dtype(dtype)
        return known

    return look_up


def _shaped_once(make):
    """Types of blocks: what follows from the shape is worked out once. It was a third of the time."""
    made = {}

    def block_type(self, element_ty, shape):
        sizes = shape.values if type(shape) is tl.tuple else shape
        key = element_ty.name, *[size.value if type(size) is tl.constexpr else size for size in sizes]
        known = made.get(key)
        if known is None or not all(type(size) is int for size in key[1:]):  # 2.0, which Triton refuses, equals 2
            make(self, element_ty, shape)
            made[key] = self.shape, self.numel, self.name
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = known

    return block_type


def _sized_once(make):
    """And tensors, the results of every operation."""
    made = {}

    def tensor(self, handle, type):
        key = tuple(type.shape.values) if type.is_block() else ()
        known = made.get(key)
        if known is None:
            make(self, handle, type)
            made[key] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = known

    return tensor


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
