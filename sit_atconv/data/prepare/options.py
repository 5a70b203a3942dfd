"""What preparation is asked for."""

from dataclasses import dataclass

from sit_atconv.data.shards.manifest import MAX_SHARD_SIZE


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare. `resolution` is (height, width); `channels` chooses grey (1) for the identity autoencoder.

    `take_latents` takes over those of a REPA directory, which also have a resolution, instead of encoding its pictures.
    `flip` also encodes mirror images; `images` keeps the crops beside their latents, and `teachers` the tokens of these
    (name, weights); `unconditional` drops the labels; more than `max_bad` pictures that cannot be decoded are an error.
    """

    source: str
    out: str
    resolution: tuple[int, int] | None
    vae: str
    take_latents: bool = False
    channels: int | None = None
    flip: bool = False
    images: bool = False
    teachers: tuple[tuple[str, str], ...] = ()
    unconditional: bool = False
    batch_size: int = 32
    shard_size: int = MAX_SHARD_SIZE
    max_bad: int = 0
    workers: int = 2
