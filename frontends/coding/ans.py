"""Asymmetric numeral systems: constriction's, where there is a wheel of it, else the same in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import portable

try:
    from constriction import stream
except ImportError:
    Coder: Any = portable.Coder
    bernoulli: Any = portable.bernoulli
    categorical: Any = portable.categorical
    uniform: Any = portable.uniform
else:
    Coder = stream.stack.AnsCoder

    def bernoulli(probability: float) -> Any:
        """See ``portable.bernoulli``."""
        return stream.model.Bernoulli(probability, perfect=False)

    def categorical(probabilities: NDArray[np.float64]) -> Any:
        """See ``portable.categorical``."""
        return stream.model.Categorical(probabilities, perfect=False)

    def uniform(size: int) -> Any:
        """See ``portable.uniform``."""
        return stream.model.Uniform(size)
