"""What is damaged: files as commands write or are given them, each with what somebody at the keyboard does with it."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from damage import Damage, damaged_array, damaged_bytes, damaged_release, damaged_tensors, damaged_text, rewritten_array
from PIL import Image
from released_sources import Source, random_state
from safetensors.torch import save_file
from sampling_fixtures import tiny_model
from training_runs import QUICKSTART

import sample
from sit_atconv.autoencoder import load_autoencoder
from sit_atconv.config import load_config
from sit_atconv.convert.__main__ import main as convert
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.evaluation import command as evaluation
from sit_atconv.runtime.reading import read_json
from sit_atconv.sampling.writing.model_card import Scores
from sit_atconv.training import plot
from sit_atconv.training.run.integrity import read_position, write_position

PREPARING = ["--resolution", "8", "--vae", "identity", "--unconditional", "--workers", "0", "--shard-size", "2"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Target(NamedTuple):
    """A file that is damaged, and what is done with it then, as by somebody at the keyboard."""

    file: Path
    use: Callable[[], object]
    damages: tuple[Damage, ...] = (damaged_text,)


def dataset(folder: Path) -> Target:
    (folder / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(np.full((8, 8, 3), 80 * number, np.uint8)).save(folder / "pictures" / f"{number}.png")
    out = str(folder / "out")
    prepare([str(folder / "pictures"), out, *PREPARING])

    def use() -> None:
        open_dataset(out).read([0, 1], [False, True], images=True)
        prepare([str(folder / "pictures"), out, *PREPARING])
        prepare([out, "--verify"])

    return Target(folder / "out" / "dataset.json", use)


def note(folder: Path) -> Target:
    """Of a shard that is complete, while the data set is not."""
    target = dataset(folder)
    manifest = json.loads(target.file.read_text())
    shard = manifest["shards"][0]
    file = target.file.with_name(shard["name"]).with_suffix(".json")
    file.write_text(json.dumps({"basis": {}, "shard": shard, "skipped": [{"index": 1, "reason": "x"}]}))
    target.file.write_text(json.dumps({**manifest, "complete": False, "shards": [], "count": 0}))
    return Target(file, lambda: prepare([str(folder / "pictures"), str(file.parent), "--max-bad", "1", *PREPARING]))


def draw(folder: Path) -> None:
    words = ["--num-samples", "2", "--steps", "1", "--solver", "euler", "--batch-size", "2"]
    sample.main(["--checkpoint", str(folder / "model"), "--out", str(folder / "out"), *words])


def model(folder: Path) -> Target:
    tiny_model(class_names=["a", "b", "c"]).save_pretrained(folder / "model")
    return Target(folder / "model" / "config.json", lambda: draw(folder))


def settings(folder: Path) -> Target:
    tiny_model().save_pretrained(folder / "model")
    draw(folder)
    return Target(folder / "out" / "settings.json", lambda: draw(folder))


def autoencoder(folder: Path) -> Target:
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks).save_pretrained(folder)
    return Target(folder / "config.json", lambda: load_autoencoder(str(folder)).encode(torch.zeros(1, 3, 16, 16)))


def repa(folder: Path) -> Target:
    (folder / "vae-sd").mkdir()
    names = ["img-mean-std-0.npy", "img-mean-std-1.npy"]
    for name in names:
        np.save(folder / "vae-sd" / name, np.zeros((8, 2, 2), np.float32))
    file = folder / "vae-sd" / "dataset.json"
    file.write_text(json.dumps({"labels": [[name, 0] for name in names]}))
    return Target(file, lambda: open_dataset(str(folder)).read([0, 1], [False, False]))


def scores(folder: Path) -> Target:
    report = {"metrics": {"fid": 1.0}, "samples": {"count": 3}, "reference": {"path": "x", "kind": "npz"}}
    (folder / "scores.json").write_text(json.dumps({**report, "warnings": ["few"]}))
    return Target(folder / "scores.json", lambda: read_json(folder / "scores.json", Scores))


def position(folder: Path) -> Target:
    sums = {"names": ["loss"], "rows": [[1.5, 3.0]]}
    numbers = {"step": 3, "images": 24, "processes": 1, "averages": sums, "guard": {"skipped": 0, "row": 0}}
    (folder / "weights.safetensors").write_bytes(b"x")
    write_position(folder, {**numbers, "best": [3, 0.5], "scaler": None})
    return Target(folder / "position.json", lambda: read_position(folder))


def log(folder: Path) -> Target:
    """Its only line; one beside it is whole."""
    whole = json.dumps({"step": 1, "loss": 1.0, "grad_norm": 1.0, "images_per_second": 3.5, "mfu": None})

    def use() -> None:
        path = folder / "log.jsonl"
        path.write_bytes(whole.encode() + b"\n" + path.read_bytes() + b"\n" + whole.encode() + b"\n")
        plot.main([str(folder), "--out", str(folder / "curves.png")])

    (folder / "log.jsonl").write_text(whole)
    return Target(folder / "log.jsonl", use)


def configuration(folder: Path) -> Target:
    """JSON is YAML."""
    values = yaml.safe_load(QUICKSTART.read_text())
    values["alignment"] = {"block": 1, "teachers": [{"name": "x"}]}
    (folder / "config.yaml").write_text(json.dumps(values))
    return Target(folder / "config.yaml", lambda: load_config(folder / "config.yaml"))


TARGETS_OF_JSON = (dataset, note, model, settings, autoencoder, repa, scores, position, log, configuration)


def pictures(folder: Path) -> Target:
    """One of three PNG files, and a JPEG and a WebP beside them."""
    (folder / "pictures").mkdir()
    for name in ("0.png", "1.jpg", "2.webp", "3.tif", "4.bmp", "5.ppm"):
        pixels = np.random.default_rng(0).integers(0, 255, (9, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / name)
    out = str(folder / "out")
    return Target(folder / "pictures", lambda: prepare([str(folder / "pictures"), out, *PREPARING]), (damaged_bytes,))


def zipped(folder: Path) -> Target:
    path = folder / "pictures.zip"
    file = pictures(folder).file
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for picture in sorted(file.iterdir()):
            archive.write(picture, f"class-{picture.suffix[1:]}/{picture.name}")
    return Target(path, lambda: prepare([str(path), str(folder / "out"), *PREPARING]), (damaged_bytes,))


def evaluate(folder: Path, *words: str) -> None:
    given = ["--features", "pixels", "--device", "cpu", "--workers", "0", *words]
    evaluation.run(evaluation.parse(given, lambda parser: []), lambda options, device: None)


def samples(folder: Path) -> Target:
    """An npz that is scored, class by class."""
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        images, labels = random.integers(0, 255, (12, 4, 4, 3), np.uint8), np.arange(12) % 3
        np.savez(folder / f"{name}.npz", arr_0=images, arr_1=labels)
    words = ["--samples", str(folder / "a.npz"), "--reference", str(folder / "b.npz"), "--classes", "0,1"]
    damages = (damaged_bytes, damaged_array)
    return Target(folder / "a.npz", lambda: evaluate(folder, *words, "--json", str(folder / "scores.json")), damages)


def reference(folder: Path) -> Target:
    """Beside statistics, which pixels do not need, images."""
    target = samples(folder)
    arrays = {**np.load(folder / "b.npz"), "mu": np.zeros(48), "sigma": np.eye(48), "count": np.array(12)}
    np.savez(folder / "b.npz", **arrays)
    return target._replace(file=folder / "b.npz")


def cache(folder: Path) -> Target:
    samples(folder)
    kept = folder / "cache"
    words = ["--samples", str(folder / "a.npz"), "--reference", str(folder / "b.npz"), "--cache", str(kept)]
    evaluate(folder, *words)
    return Target(kept, lambda: evaluate(folder, *words), (damaged_bytes,))


def weights(folder: Path) -> Target:
    tiny_model().save_pretrained(folder / "model")
    return Target(folder / "model" / WEIGHTS, lambda: draw(folder), (damaged_bytes, damaged_tensors))


def begun(folder: Path) -> Target:
    """What is left of sampling that was interrupted; settings.json has targets of its own."""
    tiny_model().save_pretrained(folder / "model")
    draw(folder)
    arrays, out = np.load(folder / "out" / "samples.npz"), folder / "out"
    (out / "partial").mkdir()
    np.save(out / "partial" / "images.npy", arrays["arr_0"])
    np.save(out / "partial" / "digests.npy", np.zeros((2, 16), np.uint8))
    (out / "samples.npz").unlink()
    return Target(out / "partial", lambda: draw(folder), (damaged_bytes,))


def drawn(folder: Path) -> Target:
    tiny_model().save_pretrained(folder / "model")
    draw(folder)
    return Target(folder / "out" / "samples.npz", lambda: draw(folder), (damaged_bytes, damaged_array))


def autoencoder_weights(folder: Path) -> Target:
    target = autoencoder(folder)
    return target._replace(file=folder / WEIGHTS, damages=(damaged_bytes, damaged_tensors))


def shard(folder: Path) -> Target:
    """Read as training reads it that was told not to verify, and verified."""
    target = dataset(folder)
    return Target(target.file.with_name("shard-00000.safetensors"), target.use, (damaged_bytes, damaged_tensors))


def latents(folder: Path) -> Target:
    target = repa(folder)
    file = folder / "vae-sd" / "img-mean-std-0.npy"
    return target._replace(file=file, damages=(damaged_bytes, rewritten_array))


def release(folder: Path, name: str = "released.pt") -> Target:
    source = Source("repa", variance=False, projector_widths=(24, 40))
    state = random_state(source)
    arguments = {"path_type": "linear", "prediction": "v", "num_classes": 5, "encoder_depth": 1, "resolution": 64}
    torch.save({"ema": state, "args": arguments, "steps": 3}, folder / "released.pt")
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "released.safetensors")

    def use() -> None:
        convert([str(folder / name), str(folder / "converted"), "--num-heads", "4", "--layout", "repa"])

    changes = damaged_release if name.endswith(".pt") else damaged_tensors
    return Target(folder / name, use, (damaged_bytes, changes, changes))


def release_in_safetensors(folder: Path) -> Target:
    return release(folder, "released.safetensors")


TARGETS_OF_BYTES = (
    pictures, zipped, samples, reference, cache, weights, begun, drawn, autoencoder_weights, shard, latents, release,
    release_in_safetensors,
)  # fmt: skip
TARGETS = (*TARGETS_OF_JSON, *TARGETS_OF_BYTES)
