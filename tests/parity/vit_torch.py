"""CLIP's image tower and DINO in PyTorch, under the keys of their authors' files."""

import math

import torch
from torch import nn
from torch.nn.functional import gelu, interpolate


class ClipBlock(nn.Module):
    def __init__(self, dim, heads, mlp_dim):
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(dim, mlp_dim), "c_proj": nn.Linear(mlp_dim, dim)})

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))


class ClipTower(nn.Module):
    def __init__(self, *, image_size, patch_size, dim, layers, heads, mlp_dim, out):
        super().__init__()
        self.conv1 = nn.Conv2d(3, dim, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(dim))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + (image_size // patch_size) ** 2, dim))
        self.ln_pre, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(ClipBlock(dim, heads, mlp_dim) for _ in range(layers)))
        self.proj = nn.Parameter(torch.zeros(dim, out))

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer.resblocks(self.ln_pre(x))[:, 0]) @ self.proj


class Clip(nn.Module):
    """With what stands for a text tower beside the image tower."""

    def __init__(self, **sizes):
        super().__init__()
        self.visual = ClipTower(**sizes)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(ClipBlock(8, 1, 4))
        self.token_embedding = nn.Embedding(10, 8)
        self.positional_embedding = nn.Parameter(torch.zeros(7, 8))
        self.ln_final = nn.LayerNorm(8)
        self.text_projection = nn.Parameter(torch.zeros(8, sizes["out"]))
        self.logit_scale = nn.Parameter(torch.zeros([]))
        self.register_buffer("input_resolution", torch.tensor(sizes["image_size"]))

    def forward(self, images):
        return self.visual(images)


class DinoBlock(nn.Module):
    def __init__(self, dim, heads, mlp_dim):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, mlp_dim), "fc2": nn.Linear(mlp_dim, dim)})

    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(-1)
        x = x + self.attn["proj"]((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp["fc2"](gelu(self.mlp["fc1"](self.norm2(x))))


class Dino(nn.Module):
    def __init__(self, *, image_size, patch_size, dim, layers, heads, mlp_dim):
        super().__init__()
        self.grid = image_size // patch_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.blocks = nn.ModuleList([DinoBlock(dim, heads, mlp_dim) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim, 1e-6)

    def positions(self, rows, columns):
        if rows == columns == self.grid:
            return self.pos_embed
        patches = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        factor = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        patches = interpolate(patches, scale_factor=factor, mode="bicubic")
        assert patches.shape[2:] == (rows, columns)
        return torch.cat([self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)], 1)

    def forward(self, images):
        x = self.patch_embed["proj"](images)
        positions = self.positions(*x.shape[2:])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


@torch.no_grad()
def randomise(model, seed=0):
    """Fill a model with values far from the initial ones, so that biases, scales and positions show in the result."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        is_vector = parameter.ndim < 2 or "pos" in name or "class" in name or "cls" in name
        if not is_vector:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        elif name.endswith("weight") and parameter.ndim == 1:  # of a norm
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(0.5 * noise)
        parameter.copy_(parameter.half())  # half precision holds it exactly
    return model.eval()
