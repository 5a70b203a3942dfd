"""The options of preparation."""

from dataclasses import dataclass, field

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.shards.manifest import MAX_SHARD_SIZE


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare, and how.

    `resolution` is (height, width); `channels` is that of the identity autoencoder (1 for grey). `take_latents` imports
    latents that another project prepared, which have a resolution already, instead of encoding pictures. `flip` also
    encodes mirror images; `images` keeps the crops beside their latents; `teachers` lists (name, weights) of teachers
    whose tokens are kept; `reading` says how pictures and labels are read. More than `max_bad` undecodable pictures are
    an error.
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
    batch_size: int = 32
    shard_size: int = MAX_SHARD_SIZE
    max_bad: int = 0
    workers: int = 2
    reading: SourceOptions = field(default_factory=lambda: SourceOptions(convert=True))
