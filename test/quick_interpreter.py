"""Spare Triton's interpreter what it does again and again.

It puts its own functions in the place of triton.language's at every launch, which is needed, and
once more at every call of a device function inside one, which changes nothing.
"""

import gc
import inspect
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

    def patch_lang(fn: Any) -> Any:
        languages = [x for x in fn.__globals__.values() if inspect.ismodule(x)]
        languages = [x for x in languages if x is tl or x is tl.core]
        # A function that the interpreter has replaced is no builtin of the language's.
        functions = [tl.tensor.__add__, *(x.load for x in languages)]
        if languages and not any(tl.core.is_builtin(x) for x in functions):
            return interpreter._LangPatchScope()
        return original(fn)

    patch_lang.quick = True
    interpreter._patch_lang = patch_lang
