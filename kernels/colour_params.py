"""What the colour augmentation shares with whoever draws its parameters: constants, and `ColourParams`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
BLUR_TAPS = 9
SOLARIZE_THRESHOLD = 0.5
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the numbers in ColourParams.order, as in torchvision's ColorJitter


@dataclass(frozen=True)
class ColourParams:
    """What to do to each of B images; all tensors on one device. Identity values leave an image exactly as it is."""

    order: Tensor
    """int64 [B, 4]: a permutation of (BRIGHTNESS, CONTRAST, SATURATION, HUE), first operation first."""
    brightness: Tensor
    """float32 [B], factor >= 0; identity 1."""
    contrast: Tensor
    """float32 [B], factor >= 0; identity 1."""
    saturation: Tensor
    """float32 [B], factor >= 0; identity 1."""
    hue: Tensor
    """float32 [B], turns in [-0.5, 0.5]; identity 0."""
    grayscale: Tensor
    """bool [B]."""
    blur: Tensor
    """bool [B]."""
    sigma: Tensor
    """float32 [B] > 0, in pixels; read where blur is set."""
    solarize: Tensor
    """bool [B]."""

    @classmethod
    def identity(cls, batch: int, device: torch.device | None = None) -> ColourParams:
        """Parameters that leave `batch` images unchanged (but for the normalisation)."""
        one = torch.ones(batch, device=device)
        no = torch.zeros(batch, dtype=torch.bool, device=device)
        order = torch.arange(4, device=device).expand(batch, 4)
        return cls(order, one, one, one, torch.zeros(batch, device=device), no, no, one, no)

    def __len__(self) -> int:
        return self.order.shape[0]

    def tensors(self) -> list[Tensor]:
        """The fields in their order."""
        return [getattr(self, f.name) for f in fields(self)]

    def pack(self) -> Tensor:
        """All parameters in one float32 [B, 12]: the order's four, then the other fields in their order."""
        order, *others = self.tensors()
        return torch.cat([order.float(), torch.stack([x.float() for x in others], 1)], dim=1)

    @classmethod
    def unpack(cls, packed: Tensor) -> ColourParams:
        """The inverse of `pack`, exact."""
        if packed.ndim != 2 or packed.shape[1] != 12:
            raise ValueError(f"packed colour parameters are float32 [B, 12], got {list(packed.shape)}")
        order = packed[:, :4].to(torch.int64, memory_format=torch.contiguous_format)
        brightness, contrast, saturation, hue, grayscale, blur, sigma, solarize = packed[:, 4:].unbind(1)
        return cls(order, brightness, contrast, saturation, hue, grayscale != 0, blur != 0, sigma, solarize != 0)

    def to(self, device: torch.device) -> ColourParams:
        """A copy on another device: one transfer from pinned memory, which the host does not wait for."""
        if self.order.device == device:
            return self
        columns = self.pack().t().contiguous()  # parameters of one kind adjacent, as the kernels read them
        if device.type == "cuda":
            columns = columns.pin_memory()
        return self.unpack(columns.to(device, non_blocking=True).t())
