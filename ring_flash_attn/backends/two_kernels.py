"""A step's backward by two kernels: one for dq, then one for dk and dv."""

from collections.abc import Callable

from torch import Tensor

from .base import GradTarget, Step
from .descriptors import Like
from .documents import Side
from .launch import Launch, targets
from .work import StepTables, kept, start_on, target_key, target_likes, target_tensors


class TwoKernelStep:
    """As BackwardStep, for tensors of given shapes and strides.

    Args:
        dq: the launch of the first kernel, which cuts rows as `queries` says.
        dkv: returns that of the second, which cuts them as `keys` says, for dk and dv like these,
            `add`, and the span.
    """

    def __init__(
        self,
        step_plan: Step,
        tables: StepTables,
        queries: Side,
        keys: Side,
        dq: Launch,
        dkv: Callable[[Like, Like, bool, int], Launch],
    ) -> None:
        self._alive, self._tables, self._queries, self._keys = (
            kept(step_plan),
            tables,
            queries,
            keys,
        )
        self._dq, self._dkv = dq, dkv
        self._starts: dict[tuple, Launch] = {}

    def run(
        self,
        step_plan: Step,
        given: dict[str, Tensor],
        dq: Tensor | None,
        result: Tensor | None,
        dkv_target: Callable[[], GradTarget],
    ) -> None:
        dq, result = targets(dq, result)
        outputs = {"dq_ptr": dq, "result_ptr": result}
        start_on(self._tables.of(step_plan, self._queries), self._dq, given | outputs)
        target = dkv_target()
        key = target_key(step_plan, target)
        start = self._starts.get(key)
        if start is None:
            start = self._starts[key] = self._dkv(*target_likes(key))
        table = self._tables.of(step_plan, self._keys)
        start_on(table, start, given | target_tensors(target))
