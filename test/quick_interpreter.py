"""Spare Triton's interpreter what it does again and again.

It puts its own functions in the place of triton.language's at every launch, which is needed, and
once more at every call of a device function inside one, which changes nothing. For every value it
makes the types of a shape and the table of numpy's types anew.
"""

import gc
import inspect
from functools import cache
from typing import Any


def quicken() -> None:
    """Do so in this process, and exempt what has been imported from garbage collection."""
    gc.collect()
    gc.freeze()
    try:
        from triton import language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    original: Any = getattr(interpreter, "_patch_lang", None)
    if original is None or getattr(original, "quick", False):
        return

    @cache
    def languages_of(fn: Any) -> list[Any]:
        languages = [x for x in fn.__globals__.values() if inspect.ismodule(x)]
        return [x for x in languages if x is tl or x is tl.core]

    def patch_lang(fn: Any) -> Any:
        languages = languages_of(fn)
        # A function that the interpreter has replaced is no builtin of the language's.
        functions = [tl.tensor.__add__, *(x.load for x in languages)]
        if languages and not any(tl.core.is_builtin(x) for x in functions):
            return interpreter._LangPatchScope()
        return original(fn)

    patch_lang.quick = True
    interpreter._patch_lang = patch_lang
    _keep_numpy_types(interpreter)
    _keep_types_of_shapes(tl.core)


def _keep_numpy_types(interpreter: Any) -> None:
    """Look a type's numpy type up once; a type is its name."""
    found: dict[str, Any] = {}
    look_up = interpreter._get_np_dtype

    def get_np_dtype(dtype: Any) -> Any:
        name = dtype.name
        if name not in found:
            found[name] = look_up(dtype)
        return found[name]

    interpreter._get_np_dtype = get_np_dtype


def _keep_types_of_shapes(core: Any) -> None:
    """Check and name a block's shape once, and make the shape that its tensors show once."""
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    unwrap, equal = core._unwrap_if_constexpr, core.dtype.__eq__
    blocks: dict[tuple, dict[str, Any]] = {}
    tensors: dict[tuple, tuple[Any, Any]] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *(x if type(x) is int else None for x in shape)
        if None in key:
            make_block(self, element_ty, shape)
            return
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = {name: getattr(self, name) for name in ("shape", "numel", "name")}
        self.element_ty = element_ty
        self.__dict__.update(blocks[key])

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in tensors:
            make_tensor(self, handle, type)
            tensors[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[key]

    def same(self: Any, other: Any) -> bool:
        return self is other or equal(self, other)

    def unwrap_if_constexpr(x: Any) -> Any:
        if type(x) is core.constexpr:
            return x.value
        return unwrap(x) if isinstance(x, list | tuple | core.tuple) else x

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor
    core.dtype.__eq__, core._unwrap_if_constexpr = same, unwrap_if_constexpr
