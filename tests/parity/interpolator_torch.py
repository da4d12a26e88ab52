"""The frame interpolator in PyTorch, written from docs/method.md and the authors' checkpoint keys; for comparison."""

import torch
from torch import nn


class ConvBlock(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, in_width, width):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )

    def forward(self, x):
        return self.conv(x)


class UNet(nn.Module):
    """Two neighbouring latent frames, [N 2C H W], to the one between them; H and W are multiples of 4."""

    def __init__(self, channels=16, widths=(32, 64, 128)):
        super().__init__()
        first, second, third = widths
        self.enc1 = ConvBlock(2 * channels, first)
        self.enc2 = ConvBlock(first, second)
        self.enc3 = ConvBlock(second, third)
        self.upconv2 = nn.ConvTranspose2d(third, second, 2, stride=2)
        self.dec2 = ConvBlock(2 * second, second)
        self.upconv1 = nn.ConvTranspose2d(second, first, 2, stride=2)
        self.dec1 = ConvBlock(2 * first, first)
        self.out_conv = nn.Conv2d(first, channels, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, pair):
        level1 = self.enc1(pair)
        level2 = self.enc2(self.pool(level1))
        level3 = self.enc3(self.pool(level2))
        level2 = self.dec2(torch.cat([self.upconv2(level3), level2], dim=1))
        return self.out_conv(self.dec1(torch.cat([self.upconv1(level2), level1], dim=1)))


def randomise(unet):
    """Give the norms, too, values that are not their first ones; returns the network in inference mode."""
    for module in unet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.2, 2.0)
    return unet.eval()


def double(unet, latents):
    """Return [B C 2F-1 H W] for [B C F H W], one pair after another."""
    frames = [latents[:, :, 0]]
    for i in range(1, latents.shape[2]):
        pair = torch.cat([latents[:, :, i - 1], latents[:, :, i]], dim=1)
        frames += [unet(pair), latents[:, :, i]]
    return torch.stack(frames, dim=2)
