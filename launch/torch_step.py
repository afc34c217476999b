"""Times FixMatch's train step with the same network in PyTorch, for comparison.

    python launch/torch_step.py --dtype=bfloat16 --side=32 --widen=2

It needs PyTorch, but not layermatch_jax. It is written for speed: the images are in device memory,
bfloat16 uses autocast, and nothing is fetched between steps. On GPUs it uses torch.compile and
channels_last, which is slower on CPUs. As in layermatch_jax, all views pass through the backbone
once, SGD has Nesterov momentum, and the parameters have an EMA.
"""

import argparse
import copy
import json
import pathlib
import statistics
import time

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

ROUNDS, SECONDS = 5, 2.0


def convolution(channels_in: int, channels: int, side: int, stride: int = 1) -> nn.Conv2d:
    """Makes a convolution as in models/layers.py: no bias, same padding, He normal (fan-out)."""
    layer = nn.Conv2d(channels_in, channels, side, stride, side // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out")
    return layer


def norm(channels: int) -> nn.BatchNorm2d:
    """Makes a BatchNorm with the decay and the epsilon of layermatch_jax."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=1e-3)


class Block(nn.Module):
    """Pre-activation residual block; see models/wide_resnet.py."""

    def __init__(self, channels_in, channels, stride, activate_shortcut):
        super().__init__()
        self.activate_shortcut = activate_shortcut
        self.norm1, self.conv1 = norm(channels_in), convolution(channels_in, channels, 3, stride)
        self.norm2, self.conv2 = norm(channels), convolution(channels, channels, 3)
        same = channels_in == channels and stride == 1
        self.shortcut = nn.Identity() if same else convolution(channels_in, channels, 1, stride)

    def forward(self, x):
        """[n, c, h, w] -> [n, channels, h / stride, w / stride]."""
        y = F.leaky_relu(self.norm1(x), 0.1)
        shortcut = self.shortcut(y if self.activate_shortcut else x)
        y = F.leaky_relu(self.norm2(self.conv1(y)), 0.1)
        return shortcut + self.conv2(y)


class WideResNet(nn.Module):
    """WideResNet with a linear classifier: images [n, 3, H, W] -> logits [n, classes]."""

    def __init__(self, depth, widen, stages, stride, classes):
        super().__init__()
        channels, blocks = 16, [convolution(3, 16, 3)]
        for stage in range(stages):
            for i in range((depth - 4) // 6):
                wide = 16 * widen * 2**stage
                down = 1 if i else stride if stage == 0 else 2
                blocks.append(Block(channels, wide, down, stage == i == 0))
                channels = wide
        self.body = nn.Sequential(*blocks, norm(channels), nn.LeakyReLU(0.1))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x):
        """[n, 3, H, W] -> logits [n, classes]."""
        return self.classifier(self.body(x).mean((2, 3)))


def main() -> None:
    """Prints steps and images per second as JSON, and writes them to --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("side", 32), ("depth", 28), ("widen", 2), ("stages", 3), ("stride", 1), ("classes", 10),
        ("batch_size", 64), ("unlabeled_ratio", 7),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=pathlib.Path)
    c = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # By default, JAX also multiplies float32 in TF32 on GPUs.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True

    model = WideResNet(c.depth, c.widen, c.stages, c.stride, c.classes)
    layout = torch.channels_last if device == "cuda" else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    parameters, averages = list(model.parameters()), list(copy.deepcopy(model).parameters())
    decayed = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.03, momentum=0.9, nesterov=True)
    network = torch.compile(model) if device == "cuda" else model
    B, count = c.batch_size, c.batch_size * c.unlabeled_ratio
    images = torch.randint(0, 256, (B + 2 * count, 3, c.side, c.side), dtype=torch.uint8)
    images = images.to(device).contiguous(memory_format=layout)
    labels = torch.randint(0, c.classes, (B,), device=device)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=c.dtype == "bfloat16"):
            logits = network((images.float() / 255 - 0.5) / 0.25)
        labeled, weak, strong = logits.float().split([B, count, count])
        confidence, targets = weak.detach().softmax(-1).max(-1)
        mask = (confidence >= 0.95).float()
        loss = F.cross_entropy(labeled, labels)
        loss = loss + (mask * F.cross_entropy(strong, targets, reduction="none")).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_mul_(averages, 0.999)
            torch._foreach_add_(averages, parameters, alpha=0.001)

    def seconds(steps):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    seconds(3)
    steps = max(round(SECONDS / seconds(2)), 1)
    rate = 1 / statistics.median(seconds(steps) for _ in range(ROUNDS))
    report = {
        "steps_per_second": rate,
        "images_per_second": rate * len(images),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        **{name: value for name, value in vars(c).items() if name != "out"},
    }
    print(json.dumps(report))
    if c.out:
        c.out.parent.mkdir(parents=True, exist_ok=True)
        c.out.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
