"""The rows of the table, and what each has to reach."""

from __future__ import annotations

from dataclasses import dataclass

from jointsparse.frontends.ranges import check_sparsity


@dataclass(frozen=True)
class Case:
    """A network at a sparsity.

    Attributes:
        network: a key of ``networks.NETWORKS``. sparsity: of every layer, in each domain, in [0, 1).
        at_least, aim: speed-up over the fastest dense fp32 engine on one thread with AVX-512; None where nothing is
            asked for.
    """

    network: str
    sparsity: float
    at_least: float | None = None
    aim: float | None = None

    def check(self) -> None:
        """Raises InputError for a sparsity out of range."""
        check_sparsity(self.sparsity, "each")


CASES = (
    Case("resnet18", 0.60),
    Case("resnet18", 0.70),
    Case("resnet18", 0.80, 3.2, 4.8),
    Case("resnet18", 0.90, 4.5, 7.0),
    Case("resnet18", 0.95),
    Case("vdsr", 0.80, 4.5, 8.0),
    Case("ct-srcnn", 0.90, 4.0, 12.0),
    Case("vgg16", 0.80, 4.0, 7.0),
    Case("alexnet", 0.80, 2.5, 4.5),
    Case("googlenet", 0.80, 2.5, 4.5),
)


def case_of(network: str, sparsity: float) -> Case:
    """The row of the table; at another sparsity than the table's, a row that asks for nothing."""
    wanted = (case for case in CASES if (case.network, case.sparsity) == (network, sparsity))
    return next(wanted, Case(network, sparsity))


TWO_THREADS_AT_LEAST = 1.8
"""Speed-up of two threads over one."""

MEMORY_AT_MOST = 1.5
"""Peak memory over that of the dense build."""
