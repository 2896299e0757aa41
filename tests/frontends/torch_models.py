"""Small torch networks with the parts that exporters and importers stumble over."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Evaluation mode, with BatchNorm statistics that are not the neutral ones."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            part.weight.data[::2] *= -1
    return module.eval()


class Residual(nn.Module):
    """A ResNet in little: stem, normalised blocks of stride 1 and 2, a projection, global pooling, a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, 2, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.project = nn.Conv2d(8, 16, 1, 2, bias=False)
        self.norm3 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = x + F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)) + self.norm3(self.project(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Mobile(nn.Module):
    """Depthwise convolution, hard-swish, squeeze and excitation, PReLU, nearest and bilinear resizing, axis means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.norm_depthwise = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 32, 1)
        self.squeeze = nn.Conv2d(32, 8, 1)
        self.excite = nn.Conv2d(8, 32, 1)
        self.prelu = nn.PReLU(32)
        self.up = nn.ConvTranspose2d(32, 8, 2, 2)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.norm(self.stem(x)))
        x = self.pointwise(F.relu6(self.norm_depthwise(self.depthwise(x))))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = self.prelu(x * gate)
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = F.interpolate(self.up(x), size=(12, 12), mode="bilinear", align_corners=False)
        x = F.pad(x, (1, 2, 0, 1))
        return self.fc(x.mean((2, 3))) + x.amax((1, 2, 3), keepdim=False).unsqueeze(1)


class Shared(nn.Module):
    """One convolution used twice, before BatchNorm and bare; grouped convolutions; two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(8, 6, 3, padding=1, groups=2, bias=False)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = self.conv(F.relu(self.norm(self.conv(x))))
        return self.grouped(torch.cat([x, other], 1))
