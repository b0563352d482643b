"""Operations and least bytes of each stage of LiFT's forward pass, to compare measured times with."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """The least work of a stage."""

    flops: int
    """Multiplications and additions of its linear maps."""
    bytes: int
    """Each input, weight and output once."""

    def __add__(self, other: object) -> Cost:
        assert isinstance(other, Cost)
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds that no implementation can beat."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def keys_flops(tokens: int, channels: int, depth: int, patch: int) -> int:
    """Multiplications and additions for the keys of the last of ``depth`` blocks, of one image with a class token."""
    count = tokens + 1
    linear = 12 * channels**2 * count
    attention = 2 * count**2 * channels
    return 2 * ((depth - 1) * (linear + attention) + tokens * channels * (channels + 3 * patch**2))


def forward_cost(
    batch: int, h: int, w: int, channels: int, image: int = 32, pool: bool = True, itemsize: int = 2
) -> dict[str, Cost]:
    """Stages of the composed forward pass for ``batch`` images of ``h x w`` cells: image encoder, upsample, head."""
    hidden, coarse, fine = channels // 2, batch * h * w, 4 * batch * h * w
    # Without pool the second convolution writes f itself, with pool a grid twice as fine.
    second = fine * (4 if pool else 1)
    first = 4 * second
    encoder = 27 * image * first + 9 * image**2 * (second + coarse)
    upsample = (4 * (channels + image) + 9 * image) * hidden * fine
    head = (9 * hidden**2 + hidden * channels) * fine
    maps = {"x": coarse * channels, "g": coarse * image, "f": fine * image, "u": fine * hidden, "y": fine * channels}
    weights = {
        "encoder": 27 * image + 18 * image**2,
        "upsample": (16 * (channels + image) + 9 * image) * hidden,
        "head": 9 * hidden**2 + hidden * channels,
    }
    return {
        "image encoder": Cost(2 * encoder, itemsize * (3 * 4 * first + maps["f"] + maps["g"] + weights["encoder"])),
        "upsample": Cost(
            2 * upsample, itemsize * (maps["x"] + maps["g"] + maps["f"] + maps["u"] + weights["upsample"])
        ),
        "head": Cost(2 * head, itemsize * (maps["u"] + maps["y"] + weights["head"])),
    }
