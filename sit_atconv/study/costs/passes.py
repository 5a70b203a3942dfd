"""What is measured of a model: its forward pass, and the trainer's own step on synthetic latents."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.data.shards.format import shard_name, write_shard
from sit_atconv.data.shards.manifest import Manifest, ShardInfo, save_manifest
from sit_atconv.runtime.measuring.timing import Run
from sit_atconv.training.session.session import Session
from sit_atconv.training.trainer import train_step

CHANNELS, CLASSES = 4, 1000
SPEC = LatentSpec("synthetic", "0" * 64, CHANNELS, 8, 0.18215, 0.0)


def forward_pass(model: nn.Module, batch_size: int, latent: int, device: torch.device) -> Run:
    """A forward pass of noise (B, 4, latent, latent) without gradients, in bf16 on a GPU and fp32 on a CPU."""
    x = torch.randn(batch_size, CHANNELS, latent, latent, device=device)
    t, y = torch.rand(batch_size, device=device), torch.arange(batch_size, device=device) % CLASSES

    def forward() -> Tensor:
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        with torch.inference_mode(), autocast:
            return model(x, t, y)

    return forward


def trainers_step(session: Session, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The work of `Trainer.step` on one batch, except for counting; returns its terms.

    That is posterior sampling, teachers, forward and backward pass, clipping, fused AdamW, averages, and the check for
    numbers that are not finite.
    """
    terms = train_step(session, lambda: batch)
    session.averages.update(1, terms["grad_norm"].isfinite())
    return terms


def write_noise(root: Path, count: int, latent: int) -> None:
    """Write a prepared data set of `count` latents of noise."""
    index, generator = torch.arange(count), torch.Generator().manual_seed(0)
    moments = torch.randn(count, 2 * CHANNELS, latent, latent, generator=generator).half()
    shard = write_shard(root / shard_name(0), {"moments": moments, "labels": index % CLASSES, "index": index})
    save_dataset(root, SPEC.downscale * latent, CLASSES, [shard], has_flip=False, has_images=False)


def save_dataset(root: Path, pixels: int, classes: int, shards: list[ShardInfo], **facts: Any) -> None:
    """Write dataset.json beside complete shards; `facts` are further fields of the manifest."""
    count = sum(shard.count for shard in shards)
    manifest = Manifest(
        source="synthetic",
        resolution=(pixels, pixels),
        latents=SPEC,
        class_names=[str(i) for i in range(classes)],
        num_classes=classes,
        shard_size=shards[0].count,
        source_count=count,
        count=count,
        complete=True,
        shards=shards,
        **facts,
    )
    save_manifest(manifest, root)
