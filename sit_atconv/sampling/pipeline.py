"""`SiTPipeline`: a SiT and its autoencoder as a diffusers pipeline."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Optional

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo, snapshot_download
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sit_atconv.autoencoder import IDENTITY, DiffusersAutoencoder, LatentSpec, load_autoencoder
from sit_atconv.errors import InputError, require_one_of
from sit_atconv.flow.field import OnStep
from sit_atconv.images import to_uint8
from sit_atconv.models import SiT
from sit_atconv.models.checkpoint import Weights, find_weights, load_model
from sit_atconv.runtime.whole_files import apply_umask, followed, write_json, write_text
from sit_atconv.sampling.draw import Drawing, latent_shape
from sit_atconv.sampling.settings import SamplerSettings
from sit_atconv.sampling.writing.model_card import write_model_card

OUTPUT_TYPES = ("pil", "pt", "np", "latent")
_OPENS_A_PIPELINE = '''"""Lets DiffusionPipeline.from_pretrained(…, trust_remote_code=True) open this directory."""

from sit_atconv import SiTPipeline  # pip install sit-atconv

__all__ = ["SiTPipeline"]
'''
_OF_THE_HUB = ("cache_dir", "token", "revision", "local_files_only")
# The entries of model_index.json: diffusers loads a class of another package from a file in the directory.
_CLASS, _TRANSFORMER = ["sit_pipeline", "SiTPipeline"], ["sit_atconv", "SiT"]
Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[..., dict[str, Tensor] | None] | None  # diffusers'


class _Interrupted(Exception):
    """Raised when a callback has set `interrupt`; carries the latents of that step."""

    def __init__(self, latents: Tensor) -> None:
        super().__init__()
        self.latents = latents


class SiTPipeline(DiffusionPipeline):
    """Draws images from a SiT, conditional or not; opens saved pipelines and the checkpoints of a training run.

    Args:
        transformer: the model.
        vae: a diffusers autoencoder, or None for a model of pixels.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(self, transformer: SiT, vae: Optional[ModelMixin] = None) -> None:  # older diffusers read no "| None"
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        # For the model card: the run's configuration, and which of a checkpoint's weights these are
        self.recipe: str | None = None
        self.weights: Weights | None = None

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "SiTPipeline":
        """Open a directory or hub repository of `save_pretrained`, or a checkpoint of training (RUN/checkpoints/…).

        Args:
            options: diffusers' options; for a checkpoint only `torch_dtype` (or `dtype`), `vae`, the place of the
                autoencoder if it is not where the checkpoint says, and `weights`, as of `sample.py --weights`.

        Raises:
            InputError: for a checkpoint that cannot be opened.
        """
        path = followed(Path(source))
        if "dtype" in options:
            options["torch_dtype"] = options.pop("dtype")
        if not path.is_dir():
            hub = {key: options.pop(key) for key in _OF_THE_HUB if key in options}
            path = Path(snapshot_download(str(source), **hub))
        weights = options.pop("weights", None)
        if weights is None and (path / "model_index.json").exists():
            return super().from_pretrained(path, **options)
        dtype, location = options.pop("torch_dtype", torch.float32), options.pop("vae", None)
        if options:
            raise InputError(
                f"{source} is a checkpoint, which takes torch_dtype, vae and weights, not {', '.join(options)}."
            )
        model = load_model(path, weights)
        module = None
        if model.config.latents is not None:
            spec = LatentSpec.from_dict(model.config.latents)
            autoencoder = load_autoencoder(spec, location=location)
            module = autoencoder.module if isinstance(autoencoder, DiffusersAutoencoder) else None
        pipeline = cls(model, module)
        pipeline.weights = find_weights(path, weights)
        if dtype != torch.float32:
            pipeline.to(dtype)
        # RUN/config.yaml of RUN/checkpoints/step-…/model
        runs = [folder.parent for folder in path.resolve().parents if folder.name == "checkpoints"]
        recipe = runs[0] / "config.yaml" if runs else path
        pipeline.recipe = recipe.read_text() if recipe.is_file() else None
        return pipeline

    @classmethod
    def load_config(cls, *arguments: Any, **options: Any) -> Any:
        """diffusers' `load_config`, with the classes of this package: no file of the directory is executed."""
        loaded = super().load_config(*arguments, **options)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if config.get("_class_name") == _CLASS:
            config |= {"_class_name": cls.__name__, "transformer": [SiT.__module__, SiT.__name__]}
        return loaded

    def save_pretrained(self, save_directory: str | Path, *, scores: str | Path | None = None, **options: Any) -> None:
        """Write all parts and README.md, the model card: recipe, metrics, licence.

        Args:
            scores: JSON that evaluate_fid.py wrote.
            options: diffusers' options except `push_to_hub`, which is a separate method.
        """
        self._save(Path(save_directory), Path(save_directory).name, scores, options)

    def _save(self, folder: Path, name: str, scores: str | Path | None, options: dict[str, Any]) -> None:
        super().save_pretrained(folder, **options)
        apply_umask(folder, "*.safetensors")
        index = folder / "model_index.json"
        write_json(index, {**json.loads(index.read_text()), "_class_name": _CLASS, "transformer": _TRANSFORMER})
        write_text(folder / f"{_CLASS[0]}.py", _OPENS_A_PIPELINE)
        write_model_card(folder, name, self.transformer, self.recipe, scores, self.weights)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        scores: str | Path | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """Upload everything that `save_pretrained` writes to the Hugging Face hub; returns the address.

        `scores` and `options` are those of `save_pretrained`.
        """
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self._save(Path(folder), repo_id, scores, options)
            return self._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        *,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            class_labels: one label or several, as numbers or class names that the model knows; None if unconditional.
            guidance_scale: 1 for none; by default 4, as in DiT's pipeline, or 1 for a model that guidance cannot use
                and for a flow map, whose weights contain guidance.
            num_inference_steps: N intervals of the solver; dopri5 chooses its own, meanflow needs 1 to 4.
            num_images: number of images per label, or in total for an unconditional model.
            height, width: in pixels, if not the training size.
            generator: one for all images, or a list with one for each image.
            latents: initial noise (B, C, h, w); drawn when not given.
            output_type: "pil", "pt" (B, 3, H, W) or "np" (B, H, W, 3) in [0, 1], or "latent" (normalised).
            callback_on_step_end: called as (pipeline, step, t, {"latents": latents}) after every step; may return
                {"latents": …} to continue with, or set `pipeline._interrupt` to stop there. Not with dopri5, where
                every image has its own steps.
            settings: further fields of `SamplerSettings`, such as solver="sde" or interval=(0.0, 0.7).

        Raises:
            InputError: for labels that the model does not have, and for settings that contradict one another.
        """
        self._require_output(output_type)
        _require_latents(callback_on_step_end_tensor_inputs)
        labels = self._labels(class_labels, num_images)
        guidance_scale = self._usual_guidance(labels) if guidance_scale is None else guidance_scale
        chosen = SamplerSettings(steps=num_inference_steps, guidance=guidance_scale, **settings)
        drawing = Drawing(self.transformer, chosen)
        self._guidance_scale, self._num_timesteps, self._interrupt = guidance_scale, num_inference_steps, False
        shape = (num_images if labels is None else len(labels), *self._latent_shape(height, width))
        _require_noise(shape, latents, generator)

        def draw_noise(step: int | None = None) -> Tensor:
            return randn_tensor(shape, generator, self._execution_device)  # the device on which an offloaded model runs

        noise = draw_noise() if latents is None else latents.to(self._execution_device, torch.float32)
        with self.progress_bar(total=num_inference_steps) as bar:
            try:
                on_step = self._on_step(chosen.solver, bar, callback_on_step_end)
                drawn = drawing.integrate(noise, labels, increment=draw_noise, on_step=on_step)
            except _Interrupted as interrupted:
                drawn = interrupted.latents
        images = self._decode(drawn, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _on_step(self, solver: str, bar: tqdm, callback: Callback) -> OnStep | None:
        """The function that the solver calls after every step: it updates the bar and calls the user's callback.

        None for dopri5 without a callback, since each image has its own steps; with one, the solver raises an error.
        """
        if solver == "dopri5" and callback is None:
            return None

        def after_step(step: int, t: float, state: Tensor) -> Tensor:
            bar.update()
            returned = callback(self, step, t, {"latents": state}) if callback is not None else None
            state = (returned or {}).get("latents", state)
            if self.interrupt:
                raise _Interrupted(state)
            return state

        return after_step

    def _labels(self, given: int | str | Sequence[int | str] | None, repeat: int) -> Tensor | None:
        """Labels (B,) on the CPU, each repeated `repeat` times; None for an unconditional model."""
        config = self.transformer.config
        if repeat < 1:
            raise InputError(f"num_images must be at least 1, not {repeat}.")
        if (given is None) != (config.num_classes == 0):
            raise InputError(
                "This model is unconditional: give num_images, not class_labels."
                if config.num_classes == 0
                else f"This model needs class_labels in [0, {config.num_classes}), or class names if it knows them."
            )
        if given is None:
            return None
        if isinstance(given, Tensor | np.ndarray | np.generic):
            given = given.tolist()
        several = [given] if isinstance(given, int | str) else list(given)
        numbers = [self.transformer.classes.find(label) for label in several]
        return torch.tensor(numbers, dtype=torch.int64).repeat_interleave(repeat)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, h, w) of latents for images of height × width pixels, by default of the training size."""
        channels, *size = latent_shape(self.transformer)
        spec = self._spec
        factor = spec.downscale if spec else 1
        for i, pixels in enumerate((height, width)):
            if pixels is not None:
                if pixels % factor:
                    raise InputError(f"Height and width must be multiples of {factor}, not {pixels}.")
                size[i] = pixels // factor
        return (channels, *size)

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the last call; like `num_timesteps` and `interrupt`, for callbacks."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of intervals of the solver in the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to stop after the current step."""
        return self._interrupt

    def _usual_guidance(self, labels: Tensor | None) -> float:
        """As in DiT's pipeline where the model can be guided; none for flow maps, whose weights contain guidance."""
        config = self.transformer.config
        return 4.0 if labels is not None and config.label_dropout and config.meanflow_blocks is None else 1.0

    def _require_output(self, output_type: str) -> None:
        """Raise `InputError` unless the pipeline can give this type of output."""
        require_one_of(output_type, OUTPUT_TYPES, "output type")
        if output_type == "latent":
            return
        spec = self._spec
        if spec is None:
            raise InputError("This model does not name the autoencoder of its latents: use output_type='latent'.")
        if self.vae is None and spec.autoencoder != IDENTITY:
            raise InputError(
                f"The pipeline has no vae, and the model's latents are those of {spec.autoencoder}: give it as vae, or "
                "use output_type='latent'."
            )

    @property
    def _spec(self) -> LatentSpec | None:
        latents = self.transformer.config.latents
        return None if latents is None else LatentSpec.from_dict(latents)

    def _decode(self, latents: Tensor, output_type: str) -> list[Image.Image] | Tensor | Any:
        if output_type == "latent":
            return latents
        decoded = self._spec.denormalise(latents)
        if self.vae is not None:
            decoded = self.vae.decode(decoded.to(self.vae.dtype)).sample
        images = self._spec.pictures(decoded.float()).clamp(-1, 1).expand(-1, 3, -1, -1)
        if output_type == "pil":
            return [Image.fromarray(array) for array in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]
        images = images / 2 + 0.5
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def _require_noise(shape: tuple[int, ...], latents: Tensor | None, generator: Generators) -> None:
    """Raise `InputError` unless given latents have this shape, and listed generators are one for each image."""
    if latents is not None and latents.shape != shape:
        raise InputError(f"latents of shape {tuple(latents.shape)} were given; expected {shape}.")
    if isinstance(generator, list | tuple) and len(generator) != shape[0]:
        raise InputError(f"{len(generator)} generators were given for {shape[0]} images: give one for each, or one.")


def _require_latents(names: Sequence[str]) -> None:
    """Raise `InputError` unless a callback asks for the latents and nothing else."""
    if set(names) != {"latents"}:
        raise InputError("Callbacks get only the latents: give ('latents',) as callback_on_step_end_tensor_inputs.")
