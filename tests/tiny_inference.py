"""A model, settings and pictures so small that evaluating takes milliseconds: for the tests of the protocol."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from depict_kernels.models import create_model


class TinyModel(nn.Module):
    """Masks that depend on position and on the whole window, so that every misplaced window shows."""

    mean, std = (0.5, 0.4, 0.45), (0.5, 0.25, 0.3)

    def __init__(self, num_classes=5, patch_size=8, seed=0):
        super().__init__()
        self.patch_size, self.num_classes = patch_size, num_classes
        torch.manual_seed(seed)
        self.embed = nn.Conv2d(3, 16, patch_size, patch_size)
        self.head = nn.Conv2d(18, num_classes, 1)
        nn.init.normal_(self.head.weight, std=2.0)
        self.batch_sizes = []

    def padded_size(self, height, width):
        return tuple(-(-side // self.patch_size) * self.patch_size for side in (height, width))

    def forward(self, images):
        self.batch_sizes.append(len(images))
        height, width = images.shape[-2:]
        padded = self.padded_size(height, width)
        x = self.embed(F.pad(images, (0, padded[1] - width, 0, padded[0] - height))).tanh()
        x = x - x.mean((2, 3), keepdim=True)
        b, _, h, w = x.shape
        y_position = torch.linspace(-1, 1, h).view(1, 1, h, 1).expand(b, 1, h, w)
        x_position = torch.linspace(-1, 1, w).view(1, 1, 1, w).expand(b, 1, h, w)
        return self.head(torch.cat([x, y_position, x_position], 1))


def tiny(name="depict_sa_vit_tiny", device="cpu", **kwargs):
    """A model of the package's own, evaluating."""
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    return create_model(name, 5, img_size=32, backbone_kwargs=small, **kwargs).to(device).eval()


def settings(**changes):
    values = {
        "mode": "slide",
        "window": 32,
        "stride": 24,
        "resize": 32,
        "scales": [1.0],
        "flip": False,
        "multiscale_scales": [0.5, 1.0, 1.5],
        "batch_windows": 4,
        "strip_rows": 16,
        "max_images": None,
    }
    return SimpleNamespace(**values | changes)


def picture(height, width, seed=1):
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 2 + height // 9, 2 + width // 9, generator=g)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")[0]
    noise = torch.rand(3, height, width, generator=g)
    return ((0.8 * smooth + 0.2 * noise).clamp(0, 1) * 255).to(torch.uint8)
