"""SiT: a diffusion transformer with adaLN-Zero blocks (arXiv 2401.08740) and any token mixer."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import Tensor, nn

from sit_atconv.classes import Classes
from sit_atconv.errors import InputError, require_one_of
from sit_atconv.models.block import Block, FinalLayer, initialise_linears, internal_head
from sit_atconv.models.embeddings import TIME_FEATURES, sincos_position, time_features
from sit_atconv.models.mixers.attend import choose_attention
from sit_atconv.models.mixers.pattern import Pattern, expand_pattern, mixer_names, with_atconv_options
from sit_atconv.models.mixers.plugins import find_plugins, origins
from sit_atconv.models.mixers.registry import HOW_TO_REGISTER, list_mixers
from sit_atconv.models.norms import NORMS
from sit_atconv.models.swiglu import MLPS, SwiGLU
from sit_atconv.runtime.whole_files import apply_umask, followed, write_text

POSITIONS = ("sincos", "table", "none")
RECOMPUTED = ("none", "mixers", "blocks")
INTERNAL = "internal"  # the key of the second head's velocity among the intermediates
_PROGRAMS_OF_A_KIND = 8  # torch's default limit
_ONCE_BESIDE_THE_PATTERN = ("kernel_size", "pool", "activation")  # options of ATConv
_JOINED_LATER: dict[str, Any] = {  # option of SiT -> default
    "norm": "layer",
    "mlp": "gelu",
    "internal_block": None,
    "meanflow_blocks": None,
}
_FOR_AUTO_MODEL = "sit_atconv.py"  # diffusers also looks here for a component of the library sit_atconv
_OPENS_A_SIT = '''"""Lets diffusers open this directory by AutoModel.from_pretrained(…, trust_remote_code=True)."""

from sit_atconv import SiT  # pip install sit-atconv

__all__ = ["SiT"]
'''


class SiT(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """Predicts the velocity of a noisy latent (B, C, H, W) at time t in [0, 1] (0 = data, 1 = noise).

    Deterministic: train and eval mode compute the same function. Label dropout belongs to the training step, which
    replaces labels by the null class `num_classes`. Height and width may be any multiples of the patch size.

    Args:
        input_size: latent height and width in training, an int or a pair; the position table is kept for this size.
        patch_size: side p of a patch.
        in_channels: latent channels.
        hidden_size: width C, a multiple of 4.
        depth, num_heads: number of blocks and of attention heads.
        mlp_ratio: MLP width over C.
        num_classes: 0 for an unconditional model, which has no label table.
        mixer_pattern: the name of a registered mixer, "hybrid" (even blocks ATConv), or a list with an entry for each
            block; a shorter list is repeated. An entry is a name, {"name": …, option: …}, or {"parallel": [entry, …]}.
        position: "sincos", computed for any size; "table", a table stored with the weights, for the training size only
            (for converted models whose table differs from the sine-cosine one); or "none".
        interpolant, prediction, latents, class_names: saved with the model because generation needs them: the
            interpolant of training, the predicted quantity ("velocity", "noise", "score" or "data"), the description of
            the latents (`sit_atconv.autoencoder.LatentSpec` as a dict), and the names of the first classes.
        label_dropout, empty_classes: saved with the model, which does not drop labels itself: the share of labels that
            training replaced by the null class (0: it was never trained, and cannot guide), and the classes of which
            training saw no picture.
        norm: "layer", or "rms" (see `block_norm`), of the blocks, the final layer and attention's qk-norm.
        mlp: "gelu", or "swiglu" (see `SwiGLU`), of the blocks.
        internal_block: a second final layer predicts from the tokens after this block, for Internal Guidance (arXiv
            2512.24176); counted from 1, before the last. None for none.
        meanflow_blocks: makes the model a flow map (Decoupled MeanFlow, arXiv 2510.24474), which predicts the average
            velocity u(x, t, r) between the times t and r <= t: so many first blocks see t, the other blocks and the
            final layer see r. None for a model of one time.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Block"]
    # `compile_repeated_blocks` compiles these, once for all blocks of a kind. Training has one batch size; where batch
    # sizes vary, as in sampling, `dynamic=True` makes one program for all of them.
    _repeated_blocks: ClassVar[list[str]] = ["Block"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["time_embed"]  # Fourier features need its precision

    @register_to_config
    def __init__(
        self,
        input_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        mixer_pattern: Pattern = "attention",
        position: str = "sincos",
        interpolant: str = "linear",
        prediction: str = "velocity",
        latents: dict | None = None,
        class_names: Sequence[str] | None = None,
        label_dropout: float = 0.1,
        empty_classes: Sequence[int] | None = None,
        norm: str = "layer",
        mlp: str = "gelu",
        internal_block: int | None = None,
        meanflow_blocks: int | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % 4:
            raise InputError(f"hidden_size must be a multiple of 4 for the position embedding, not {hidden_size}.")
        require_one_of(position, POSITIONS, "position embedding")
        require_one_of(norm, NORMS, "norm")
        require_one_of(mlp, MLPS, "MLP")
        if num_classes < 0 or depth < 1 or patch_size < 1:
            raise InputError(
                f"num_classes must be >= 0, depth and patch_size >= 1, not {num_classes}, {depth}, {patch_size}."
            )
        if meanflow_blocks is not None and not 1 <= meanflow_blocks <= depth:
            raise InputError(f"meanflow_blocks must be from 1 to the depth, {depth}, not {meanflow_blocks}.")
        self.patch_size, self.in_channels, self.num_classes = patch_size, in_channels, num_classes
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.grid = self._grid(*size)  # tokens along height and width at the training size
        patch_channels = patch_size**2 * in_channels

        self.patch_embed = nn.Linear(patch_channels, hidden_size)  # the p×p convolution of stride p
        self.time_embed = nn.Sequential(
            nn.Linear(TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.label_embed = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None  # last row = null
        entries = expand_pattern(mixer_pattern, depth)
        find_plugins(mixer_names(entries))
        mixers = [entry.build(hidden_size, num_heads, norm) for entry in entries]
        for mixer in mixers:
            if hasattr(mixer, "check_grid"):
                mixer.check_grid(self.grid)
        self.blocks = nn.ModuleList(Block(hidden_size, mixer, mlp_ratio, norm) for mixer in mixers)
        self.register_to_config(auto_map={"AutoModel": f"{Path(_FOR_AUTO_MODEL).stem}.SiT"})
        if foreign := origins(mixer_names(entries)):
            self.register_to_config(mixer_origins=foreign)  # for the error when a user opens the model without them
        self.final = FinalLayer(hidden_size, patch_channels, norm)
        table = None if position == "none" else sincos_position(hidden_size, self.grid)
        self.register_buffer("position_table", table, persistent=position == "table")
        self.register_load_state_dict_post_hook(SiT._make_position_table)
        self.gradient_checkpointing = False
        self._initialise()
        self._draw_last(patch_channels)

    @property
    def classes(self) -> Classes:
        """Numbers and names of the classes."""
        return Classes(self.num_classes, self.config.class_names, self.config.empty_classes or ())

    def _initialise(self) -> None:
        """DiT's initialisation (blocks start as the identity, the velocity as zero), then that of each mixer."""
        initialise_linears(self)
        for module in (self.label_embed, self.time_embed[0], self.time_embed[2]):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)
        for linear in (*(block.modulation for block in self.blocks), self.final.modulation, self.final.proj):
            nn.init.zeros_(linear.weight)
        for block in self.blocks:
            if hasattr(block.mixer, "initialise"):
                block.mixer.initialise()

    def _draw_last(self, patch_channels: int) -> None:
        """Parts that joined later, made after all others, whose weights are then those of the model without them."""
        config = self.config
        if config.mlp == "swiglu":
            for block in self.blocks:
                block.mlp = SwiGLU(config.hidden_size, int(config.hidden_size * config.mlp_ratio))
                initialise_linears(block.mlp)
        self.internal = None
        if (block := config.internal_block) is not None:
            self.internal = internal_head(block, config.depth, config.hidden_size, patch_channels, config.norm)

    def to_json_string(self) -> str:
        """diffusers' text of config.json; options that joined later only where they are set, as earlier versions do."""
        config = json.loads(super().to_json_string())
        set_here = {key: value for key, value in config.items() if value != _JOINED_LATER.get(key, ...)}
        return json.dumps(set_here, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """diffusers' `save_config`, and beside config.json a module through which its AutoModel opens the directory."""
        super().save_config(save_directory, *arguments, **options)
        write_text(Path(save_directory, _FOR_AUTO_MODEL), _OPENS_A_SIT)

    def save_pretrained(self, save_directory: str | Path, *arguments: Any, **options: Any) -> None:
        """diffusers' `save_pretrained`; files get the mode of the umask, which safetensors ignores."""
        super().save_pretrained(save_directory, *arguments, **options)
        apply_umask(Path(save_directory), "*.safetensors")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Any:
        """diffusers' `from_pretrained`, which also finds RUN/checkpoints/latest/model where `latest` is a file."""
        return super().from_pretrained(str(followed(Path(pretrained_model_name_or_path))), **options)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """diffusers' `from_config`, which `from_pretrained` calls; it also reads the files of earlier versions.

        Raises `InputError` when the model has a mixer that is not registered: config.json never causes an import.
        """
        if isinstance(config, Mapping):
            config = dict(config)
            # In earlier versions ATConv's options stood beside the pattern.
            atconv = {key: config.pop(key) for key in _ONCE_BESIDE_THE_PATTERN if key in config}
            pattern = config.get("mixer_pattern", "attention")
            config["mixer_pattern"] = with_atconv_options(pattern, atconv)
            names = mixer_names(expand_pattern(pattern, config.get("depth", 28)))
            _require_registered(names, config.pop("mixer_origins", {}))
            config.pop("auto_map", None)
        return super().from_config(config, **options)

    def _make_position_table(self, _: object = None) -> None:
        """Compute the table on the device of the loaded weights: a model built on the "meta" device has none."""
        if self.config.position == "sincos":
            table = sincos_position(self.config.hidden_size, self.grid, self.patch_embed.weight.device)
            self.position_table = table.to(self.position_table.dtype)

    def recompute(self, what: str) -> None:
        """Choose what the backward pass recomputes (gradient checkpointing), to save memory at the cost of time.

        "mixers": norm, modulation and token mixer of every block; "blocks": whole blocks, as diffusers'
        `enable_gradient_checkpointing`; "none": nothing. Loss and gradients are the same.
        """
        require_one_of(what, RECOMPUTED, "gradient checkpointing")
        if what == "blocks":
            self.enable_gradient_checkpointing()
        else:
            self.disable_gradient_checkpointing()
        for block in self.blocks:
            block.recompute_mixer = what == "mixers"

    def set_attention_backend(self, backend: str) -> None:
        """Run attention on one of diffusers' backends, such as "flash" or "_native_math"."""
        super().set_attention_backend(backend)  # checks the name, and that its package is installed
        choose_attention(self, AttentionBackendName(backend.lower()))

    def reset_attention_backend(self) -> None:
        """Back to torch's fused attention."""
        super().reset_attention_backend()
        choose_attention(self, None)

    def compile_repeated_blocks(self, *arguments: Any, **options: Any) -> None:
        """diffusers' `compile_repeated_blocks`: each kind of block is compiled once, and again for new sizes.

        The compiler limits the number of programs of all kinds together; the limit is raised to its default per kind.
        """
        kinds = {str(entry) for entry in expand_pattern(self.config.mixer_pattern, len(self.blocks))}
        settings = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, _PROGRAMS_OF_A_KIND * len(kinds))
        super().compile_repeated_blocks(*arguments, **options)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        rows: Tensor | None = None,
        return_dict: bool | None = None,
        internal: bool = False,
        r: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...] | Transformer2DModelOutput:
        """The velocity at x (B, C, H, W), times t (B,) or one scalar, labels y (B,) int64: a tensor of x's shape.

        Whatever depends only on time and label is computed once if samples share it: for one scalar t without labels,
        or for U labels y (with U times, or one), with `rows` (B,) int64 as the index of each sample's label.

        `return_dict` is for diffusers' clients: True wraps the velocity as `.sample`, False puts it into a tuple.
        `internal`: return a pair, the velocity and that of the head after `internal_block`.

        With times r of t's shape, a flow map gives the average velocity between t and r; without them r = t, and that
        is the velocity at t.

        Raises `InputError` when the patch does not divide H and W, when labels are missing or not accepted, or for r
        where the model is no flow map.
        """
        velocity, found = self.forward_intermediates(x, t, y, blocks=(), rows=rows, internal=internal, r=r)
        if internal:
            return velocity, found[INTERNAL]
        if return_dict is None:
            return velocity
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def forward_intermediates(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        blocks: Iterable[int] = (8,),
        rows: Tensor | None = None,
        read: Callable[[int, Tensor], Any] | None = None,
        internal: bool = False,
        r: Tensor | None = None,
    ) -> tuple[Tensor, dict[int | str, Any]]:
        """`forward`, and the tokens (B, N, C) after each of `blocks`, which are counted from 1.

        If `read` is given, its result for (block, tokens) is returned instead of the tokens. It is called right after
        the block, so that its backward pass runs when the later blocks have freed their memory. `internal` adds the
        velocity of the head after `internal_block` under the key `INTERNAL`.
        """
        wanted = set(blocks)
        if not wanted <= set(range(1, len(self.blocks) + 1)):
            raise InputError(f"Blocks {sorted(wanted)} asked for; the model has blocks 1 to {len(self.blocks)}.")
        if internal and self.internal is None:
            raise InputError("This model has no second head (internal_block), which Internal Guidance needs.")
        grid = self._grid(*x.shape[-2:])
        c = nn.functional.silu(self.condition(t.to(x.device, non_blocking=True), y, x.dtype))
        seen_first, c_end = (len(self.blocks), c) if r is None else self._end(r.to(x.device, non_blocking=True), y, x)
        tokens = self.embed_patches(x, grid)

        intermediates = {}
        for number, block in enumerate(self.blocks, start=1):
            seen = c if number <= seen_first else c_end
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, seen, grid, rows)
            else:
                tokens = block(tokens, seen, grid, rows)
            if number in wanted:
                intermediates[number] = tokens if read is None else read(number, tokens)
            if internal and number == self.config.internal_block:
                intermediates[INTERNAL] = self.unpatchify(self.internal(tokens, c, rows), grid)
        return self.unpatchify(self.final(tokens, c_end, rows), grid), intermediates

    def _end(self, r: Tensor, y: Tensor | None, x: Tensor) -> tuple[int, Tensor]:
        """How many first blocks see t, and the condition of the others: the same embedding, of the times r."""
        if self.config.meanflow_blocks is None:
            raise InputError(
                "This model gives the velocity at a time t and takes no r: it is no flow map, which training with "
                "flow.objective meanflow makes of it."
            )
        return self.config.meanflow_blocks, nn.functional.silu(self.condition(r, y, x.dtype))

    def condition(self, t: Tensor, y: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """Embedding of times t, (U,) or a scalar, and labels y (U,): (U, C), or (1, C) for a scalar without labels.

        `dtype` is that of the activations: it cannot be read from quantised weights.
        """
        if (y is None) != (self.label_embed is None):
            raise InputError(
                "This model is unconditional (num_classes = 0) and takes no labels."
                if self.label_embed is None
                else f"This model needs labels in [0, {self.num_classes}); the null class is {self.num_classes}."
            )
        embedding = self.time_embed(time_features(t.reshape(-1)).to(dtype))
        return embedding if y is None else embedding + self.label_embed(y)

    def embed_patches(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Latents (B, C_in, H, W) to tokens (B, N, C) with the position embedding added."""
        p = self.patch_size
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        tokens = self.patch_embed(patches).to(x.dtype)  # under autocast the residual stream stays in fp32
        if self.position_table is None:
            return tokens
        table = self.position_table
        if grid != self.grid:
            if self.config.position == "table":
                raise InputError(
                    f"This model has a position table for {self.grid} tokens and does not work with {grid}. If it was "
                    "converted from a rounded sine-cosine table, convert it again with --position sincos."
                )
            table = sincos_position(tokens.shape[-1], grid, tokens.device).to(table.dtype)
        return tokens + table.to(tokens.dtype)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches (B, N, p²·C) to latents (B, C, H, W)."""
        h, w = grid
        p = self.patch_size
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        if height % p or width % p or not height or not width:
            raise InputError(
                f"A latent of {height}×{width} cannot be cut into patches of {p}×{p}: "
                f"choose a resolution whose latent is a multiple of {p}, or a model with a smaller patch."
            )
        return height // p, width // p


def _require_registered(names: set[str], origins: Mapping[str, str]) -> None:
    """Raise `InputError`, naming its origin, for a mixer of a config.json that is not registered."""
    find_plugins(names)
    for name in sorted(names - set(list_mixers())):
        origin = f", which comes from {origins[name]}" if name in origins else ""
        raise InputError(
            f"The model mixes tokens by '{name}'{origin}, and no mixer of that name is registered. {HOW_TO_REGISTER}"
        )
