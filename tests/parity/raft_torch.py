"""RAFT's large model in PyTorch, under the keys of its authors' files, with the widths as arguments."""

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, grid_sample, pad, relu, softmax, unfold

RADIUS, LEVELS = 4, 4


def norm(kind, width):
    return nn.BatchNorm2d(width) if kind == "batch" else nn.InstanceNorm2d(width)


class Block(nn.Module):
    def __init__(self, inputs, width, kind, stride):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, width, 3, stride, 1), nn.Conv2d(width, width, 3, 1, 1)
        self.norm1, self.norm2 = norm(kind, width), norm(kind, width)
        self.downsample = None
        if stride > 1:
            self.norm3 = norm(kind, width)
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride), self.norm3)

    def forward(self, x):
        y = relu(self.norm2(self.conv2(relu(self.norm1(self.conv1(x))))))
        return relu((x if self.downsample is None else self.downsample(x)) + y)


class Encoder(nn.Module):
    def __init__(self, widths, outputs, kind):
        super().__init__()
        one, two, three = widths
        self.conv1, self.norm1 = nn.Conv2d(3, one, 7, 2, 3), norm(kind, one)
        self.layer1 = nn.Sequential(Block(one, one, kind, 1), Block(one, one, kind, 1))
        self.layer2 = nn.Sequential(Block(one, two, kind, 2), Block(two, two, kind, 1))
        self.layer3 = nn.Sequential(Block(two, three, kind, 2), Block(three, three, kind, 1))
        self.conv2 = nn.Conv2d(three, outputs, 1)

    def forward(self, x):
        return self.conv2(self.layer3(self.layer2(self.layer1(relu(self.norm1(self.conv1(x)))))))


class MotionEncoder(nn.Module):
    def __init__(self, widths, outputs, radius):
        super().__init__()
        one, two, three, four = widths
        self.convc1, self.convc2 = nn.Conv2d(LEVELS * (2 * radius + 1) ** 2, one, 1), nn.Conv2d(one, two, 3, 1, 1)
        self.convf1, self.convf2 = nn.Conv2d(2, three, 7, 1, 3), nn.Conv2d(three, four, 3, 1, 1)
        self.conv = nn.Conv2d(two + four, outputs - 2, 3, 1, 1)

    def forward(self, flow, correlations):
        seen = relu(self.convc2(relu(self.convc1(correlations))))
        known = relu(self.convf2(relu(self.convf1(flow))))
        return torch.cat([relu(self.conv(torch.cat([seen, known], 1))), flow], 1)


class Unit(nn.Module):
    def __init__(self, hidden, inputs):
        super().__init__()
        for name in "zrq":
            setattr(self, f"conv{name}1", nn.Conv2d(hidden + inputs, hidden, (1, 5), padding=(0, 2)))
            setattr(self, f"conv{name}2", nn.Conv2d(hidden + inputs, hidden, (5, 1), padding=(2, 0)))

    def forward(self, h, x):
        for axis in "12":
            z, r, q = (getattr(self, f"conv{name}{axis}") for name in "zrq")
            both = torch.cat([h, x], 1)
            share = torch.sigmoid(z(both))
            h = (1 - share) * h + share * torch.tanh(q(torch.cat([torch.sigmoid(r(both)) * h, x], 1)))
        return h


class Head(nn.Module):
    def __init__(self, inputs, hidden):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, hidden, 3, 1, 1), nn.Conv2d(hidden, 2, 3, 1, 1)

    def forward(self, x):
        return self.conv2(relu(self.conv1(x)))


class Update(nn.Module):
    def __init__(self, hidden, context, motion_widths, motion, head, radius):
        super().__init__()
        self.encoder = MotionEncoder(motion_widths, motion, radius)
        self.gru = Unit(hidden, context + motion)
        self.flow_head = Head(hidden, head)
        self.mask = nn.Sequential(nn.Conv2d(hidden, head, 3, 1, 1), nn.ReLU(), nn.Conv2d(head, 576, 1))


class Raft(nn.Module):
    def __init__(
        self, widths=(64, 96, 128), features=256, hidden=128, context=128, motion_widths=(256, 192, 128, 64),
        motion=128, head=256, radius=RADIUS,
    ):  # fmt: skip
        super().__init__()
        self.hidden, self.radius = hidden, radius
        self.fnet = Encoder(widths, features, "instance")
        self.cnet = Encoder(widths, hidden + context, "batch")
        self.update_block = Update(hidden, context, motion_widths, motion, head, radius)

    def around(self, pyramid, places):
        """Correlations around places [B 2 h w], as `grid_sample` reads them one window a pixel."""
        batch, _, rows, columns = places.shape
        steps = torch.arange(-self.radius, self.radius + 1.0)
        window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)  # its first axis is added to x
        found = []
        for number, level in enumerate(pyramid):
            at = places.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2) / 2**number + window
            size = torch.tensor(level.shape[:1:-1])
            read = grid_sample(level, 2 * at / (size - 1) - 1, align_corners=True)
            found.append(read.view(batch, rows, columns, -1))
        return torch.cat(found, -1).permute(0, 3, 1, 2)

    def forward(self, first, second, steps=20):
        first, second = (2 * (x / 255) - 1 for x in (first, second))
        one, two = self.fnet(torch.cat([first, second])).chunk(2)
        batch, channels, rows, columns = one.shape
        level = torch.einsum("bchw,bcij->bhwij", one, two).reshape(-1, 1, rows, columns) / channels**0.5
        pyramid = [level]
        for _ in range(LEVELS - 1):
            pyramid.append(avg_pool2d(pyramid[-1], 2))
        both = self.cnet(first)
        net, context = torch.tanh(both[:, : self.hidden]), relu(both[:, self.hidden :])
        places = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")).float()
        flow = torch.zeros(batch, 2, rows, columns)
        for _ in range(steps):
            motion = self.update_block.encoder(flow, self.around(pyramid, places + flow))
            net = self.update_block.gru(net, torch.cat([context, motion], 1))
            flow = flow + self.update_block.flow_head(net)
        mask = softmax((0.25 * self.update_block.mask(net)).view(batch, 1, 9, 8, 8, rows, columns), 2)
        around = unfold(8 * flow, (3, 3), padding=1).view(batch, 2, 9, 1, 1, rows, columns)
        return (mask * around).sum(2).permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, 8 * rows, 8 * columns)


def padded(pictures):
    """As RAFT's InputPadder: to multiples of 8, the odd pixel below and right."""
    height, width = pictures.shape[-2:]
    down, across = -height % 8, -width % 8
    edges = [across // 2, across - across // 2, down // 2, down - down // 2]
    return pad(pictures, edges, mode="replicate")


@torch.no_grad()
def randomise(model, seed=0):
    """Fill a model with values that show biases, statistics and scales, and with which the flow stays in the picture.

    All are exact in half precision.
    """
    torch.manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape)
        if not value.is_floating_point():
            continue
        if value.ndim == 4:
            noise *= value[0].numel() ** -0.5
        elif name.endswith("running_var"):
            noise = 0.5 + torch.rand(value.shape)
        elif name.endswith("weight"):
            noise = 1 + 0.2 * noise
        else:
            noise *= 0.2
        value.copy_(noise.half())
    return model.eval()
