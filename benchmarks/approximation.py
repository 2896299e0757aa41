"""Ways to make a classifier smaller, side by side: weights, multiplications, accuracy before and after fine-tuning.

    python -m benchmarks.approximation RECIPE WEIGHTS --data CIFAR10 --output DIR [--ratio R ...] [--method M ...]

RECIPE and WEIGHTS: of ``jointsparse train``, such as vgg16_cifar and DIR/model.safetensors. Every method gets as many
weights of convolutions and fully-connected layers, and is fine-tuned alike: AdamW, half a cosine, the recipe's
augmentation. Methods: ours, and its parts alone, "structured" and "low-rank", by ``frontends.approximate`` on training
images; "svd" and "tucker" of the weights alone (``decompositions``).

DIR/results.json keeps the rows as they come; the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import decompositions
from jointsparse.frontends import approximate
from jointsparse.frontends.networks import build
from jointsparse.frontends.outputs import replacing
from jointsparse.frontends.recipe import read_recipe
from jointsparse.frontends.shipped import find_recipe
from jointsparse.frontends.state_dicts import load_weights
from jointsparse.frontends.tasks import Classification, evaluate

IMAGES = 1024
"""That the approximation looks at."""

Method = Callable[[nn.Module, Sequence[Tensor], float], nn.Module]


def _ours(parts: str, model: nn.Module, images: Sequence[Tensor], ratio: float) -> nn.Module:
    return approximate(model, images, ratio, parts=parts, loss="cross-entropy", progress=print)


METHODS: Mapping[str, Method] = {
    "ours": partial(_ours, "both"),
    "structured": partial(_ours, "sparse"),
    "low-rank": partial(_ours, "low-rank"),
    "svd": lambda model, images, ratio: decompositions.svd(model, ratio),
    "tucker": lambda model, images, ratio: decompositions.tucker(model, ratio),
}


@dataclass(frozen=True)
class Tuning:
    """Epochs and the highest rate of fine-tuning."""

    epochs: int
    rate: float


def multiplications(model: nn.Module, image: Tensor) -> int:
    """Of an image, by weights of convolutions and fully-connected layers."""
    total = 0

    def count(module: Any, inputs: Any, output: Tensor) -> None:
        nonlocal total
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        total += module.weight.numel() * output[0].numel() // outputs

    handles = [module.register_forward_hook(count) for _, module in decompositions.layers(model)]
    with torch.inference_mode():
        model(image[:1])
    for handle in handles:
        handle.remove()
    return total


def tune(model: nn.Module, task: Classification, tuning: Tuning) -> nn.Module:
    """Fine-tune in place."""
    steps, at = tuning.epochs * task.steps(), 0
    optimiser = torch.optim.AdamW(model.parameters(), tuning.rate, weight_decay=5e-2)
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for epoch in range(tuning.epochs):
        batches = task.dataset(epoch, 0, 1)
        for index in range(task.steps()):
            for group in optimiser.param_groups:
                group["lr"] = tuning.rate * 0.5 * (1 + math.cos(math.pi * at / steps))
            images, labels = batches[index]
            with torch.autocast("cpu", torch.bfloat16):
                output = model(images.contiguous(memory_format=torch.channels_last))
            optimiser.zero_grad()
            F.cross_entropy(output.float(), labels).backward()
            optimiser.step()
            at += 1
    return model.eval()


def measure(method: str, ratio: float, model: nn.Module, task: Classification, tuning: Tuning) -> dict[str, Any]:
    """A row."""
    batches = task.dataset(10**6, 0, 1)
    images = [batches[index][0] for index in range(-(-IMAGES // task.spec.batch))]
    start = time.time()
    made = METHODS[method](model, images, ratio)
    seconds, counts = round(time.time() - start, 1), (decompositions.weights, partial(multiplications, image=images[0]))
    before, after = ([count(one) for count in counts] for one in (model, made))
    accuracy = evaluate(task, made)
    tune(made, task, tuning)
    return {
        "method": method,
        "ratio": ratio,
        "weights": after[0],
        "parameter_ratio": round(before[0] / after[0], 3),
        "multiplication_ratio": round(before[1] / after[1], 3),
        "seconds": seconds,
        "before": accuracy,
        "after": evaluate(task, made),
    }


def table(results: Mapping[str, Any]) -> Table:
    """For people."""
    made = Table(title=f"{results['network']}, {results['weights']:,} weights, {_figures(results['accuracy'])} % right")
    for column in ("method", "ratio", "weights", "fewer multiplications", "as it is", "fine-tuned"):
        made.add_column(column, justify="left" if column == "method" else "right")
    for row in sorted(results["rows"], key=lambda row: (row["ratio"], -max(row["after"].values()))):
        ratios = f"{row['ratio']:g}", f"{row['weights']:,}", f"{row['multiplication_ratio']:.2f}x"
        made.add_row(row["method"], *ratios, _figures(row["before"]), _figures(row["after"]))
    return made


def _figures(accuracy: Mapping[str, float]) -> str:
    return " / ".join(f"{value:.2f}" for value in accuracy.values())


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=find_recipe)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--ratio", type=float, nargs="+", default=[2.0, 4.0, 5.0])
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rate", type=float, default=5e-4)
    given = parser.parse_args()
    plan = read_recipe(given.recipe)
    task = Classification(plan, given.data)
    if plan.run.threads:
        torch.set_num_threads(plan.run.threads)
    model = build(plan.network.name, **plan.network.options)
    load_weights(model, given.weights)
    model.eval()
    given.output.mkdir(parents=True, exist_ok=True)
    file, tuning = given.output / "results.json", Tuning(given.epochs, given.rate)
    results = json.loads(file.read_text()) if file.exists() else {"rows": []}
    results |= {"network": plan.network.name, "weights": decompositions.weights(model)}
    results["accuracy"] = results.get("accuracy") or evaluate(task, model)
    done = {(row["method"], row["ratio"]) for row in results["rows"]}
    for ratio in given.ratio:
        for method in given.method:
            if (method, ratio) in done:
                continue
            torch.manual_seed(0)
            results["rows"].append(measure(method, ratio, model, task, tuning))
            with replacing(file) as scratch:
                scratch.write_text(json.dumps(results, indent=1) + "\n")
            print(results["rows"][-1], flush=True)
    Console(width=120).print(table(results))


if __name__ == "__main__":
    main()
