"""What is computed: the parameters of one attention call, as a value."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Attention:
    """Describe softmax(softmax_scale * q k^T + mask) v, independent of how the rows are laid out.

    Attributes:
        softmax_scale: factor on q k^T before the softmax, > 0.
        causal: a query sees no key of a later global position.
        window: (left, right) in tokens of global position, -1 for open. Query i sees key j iff
            i - left <= j <= i + right. `causal` closes the right side whatever `right` says.
        deterministic: gradients must be bitwise repeatable.
    """

    softmax_scale: float
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    deterministic: bool = False

    @property
    def left(self) -> int | None:
        """How far back a query sees, in tokens; None if everything."""
        return None if self.window[0] < 0 else self.window[0]

    @property
    def right(self) -> int | None:
        """How far ahead a query sees, in tokens; None if everything, 0 if causal."""
        if self.causal:
            return 0
        return None if self.window[1] < 0 else self.window[1]

    @property
    def masked(self) -> bool:
        """Whether positions matter at all."""
        return self.left is not None or self.right is not None
