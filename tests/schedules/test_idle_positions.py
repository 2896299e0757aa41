"""Convolutions whose filters leave positions of a tile without a weight, in every layout and NCHW, against float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relay
from tvm.contrib import graph_executor

from jointsparse.passes.absorb_conversions import AbsorbConversions
from jointsparse.schedules.attributes import winograd_plan_of
from jointsparse.schedules.constructors import conv2d_sparse_winograd
from jointsparse.schedules.geometry import ConvGeometry
from jointsparse.schedules.tiles import CHUNKS, SHARED, SINGLE
from jointsparse.schedules.winograd import transform
from tests import reference
from tests.host import AVX512, HASWELL, TARGETS
from tests.schedules.convolutions import TOLERANCE

IDLE = {
    "a row": range(6, 12),
    "a column": range(2, 36, 6),
    "the edges": [p for p in range(36) if p < 6 or p % 6 == 0],
    "one half": range(0, 36, 2),
    "all but the first": range(1, 36),
    "all but the last": range(35),
    "all": range(36),
}
SIZES = {(10, 12): {SINGLE, SHARED}, (28, 64): {CHUNKS}, (6, 64): {CHUNKS}}
"""Of images: the forms of tiles that they may have, blocks in parallel for one and not for the others."""


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("target", [target for target in TARGETS if target in (AVX512, HASWELL)])
def test_idle_positions(name: str, target: str, use_threads: Callable[[int], None]) -> None:
    rng = np.random.default_rng(0)
    outputs, parameters, values, wanted = [], [], {}, []
    for number, ((height, width), forms) in enumerate(SIZES.items()):
        geometry = ConvGeometry(2, 3, height, width, 4, (3, 3), padding=(1, 1, 1, 1))
        weight = transform(4, 3).filters(rng.standard_normal(geometry.weight_shape)).reshape(4, 3, 36)
        weight[:, :, list(IDLE[name])] = 0
        weight = weight.reshape(4, 3, 6, 6).astype(np.float32)
        data = rng.standard_normal((2, 3, height, width)).astype(np.float32)
        x = relay.var(f"x{number}", shape=data.shape)
        y = conv2d_sparse_winograd(x, weight, geometry, 4, target)
        plan = winograd_plan_of(y.args[0].attrs)
        assert plan.idle == tuple(p for p in IDLE[name] if name != "all" or p < 35)
        assert plan.layout.form in forms
        activated = relay.nn.relu(y)
        parameters.append(x)
        values[f"x{number}"] = data
        outputs += [y, activated]
        want = reference.winograd(data, weight, geometry, 4)
        wanted += [want, np.maximum(want, 0)]
    mod = tvm.IRModule.from_expr(relay.Function(parameters, relay.Tuple(outputs)))
    for change in (lambda mod: mod, AbsorbConversions()):
        with tvm.transform.PassContext(opt_level=3):
            library = relay.build(change(mod), target=target)
        for threads in (1, 2):
            use_threads(threads)
            executor = graph_executor.GraphModule(library["default"](tvm.cpu()))
            executor.run(**values)
            for i, want in enumerate(wanted):
                error = np.abs(executor.get_output(i).numpy() - want).max()
                assert error <= 20 * TOLERANCE[4] * max(1.0, np.abs(want).max())
