"""Decodes one batch while the next one is being drawn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sit_atconv.autoencoder import Autoencoder
from sit_atconv.images import to_uint8


@dataclass(frozen=True)
class Decoding:
    """Images that are being copied to the CPU; `ready` is None if the copy is complete."""

    images: Tensor
    ready: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """Wait for the images (b, 3, H, W) uint8 and return them."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.images


class Decoder:
    """Decodes batches: on CUDA in a separate stream, concurrently with later work; elsewhere synchronously."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder
        device = autoencoder.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def overlaps(self) -> bool:
        """Whether `start` returns before the work is done."""
        return self._stream is not None

    def start(self, latents: Tensor) -> Decoding:
        """Start decoding normalised latents (b, C, h, w)."""
        if self._stream is None:
            return Decoding(to_uint8(self.autoencoder.decode(latents)).cpu(), None)
        self._stream.wait_stream(torch.cuda.current_stream(latents.device))
        latents.record_stream(self._stream)  # so that its memory is not reused before this stream has read it
        with torch.cuda.stream(self._stream):
            images = to_uint8(self.autoencoder.decode(latents))
            host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
            host.copy_(images, non_blocking=True)
            return Decoding(host, self._stream.record_event())
