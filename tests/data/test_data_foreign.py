"""Latents of EDM2, LightningDiT, fast-DiT and MAR: imported with what they mean, and decoded to the right pictures."""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from sampling_fixtures import tiny_model
from test_autoencoder import small_kl
from torch import Tensor

from sit_atconv.autoencoder import LatentSpec, load_autoencoder
from sit_atconv.data.dataset import LatentDataset, open_dataset
from sit_atconv.data.foreign.open import open_foreign
from sit_atconv.data.prepare.__main__ import main
from sit_atconv.errors import InputError
from sit_atconv.images import to_float, to_uint8
from sit_atconv.sampling.pipeline import SiTPipeline
from sit_atconv.sampling.run import open_generator

COUNT, LABELS = 11, [2, 0, 1, 1, 0, 2, 2, 1, 0, 0, 1]
SD = 0.18215


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
    """A random encoder, scaled as Stable Diffusion's. Whatever it decodes is grey, in [0, 1] as in [-1, 1]."""
    folder = small_kl(tmp_path_factory.mktemp("vae"), stages=4, scaling_factor=SD)
    module = AutoencoderKL.from_pretrained(folder)
    torch.nn.init.constant_(module.decoder.conv_out.weight, 1e-3)
    torch.nn.init.constant_(module.decoder.conv_out.bias, 0.5)
    module.save_pretrained(folder)
    return str(folder)


def pictures() -> Tensor:
    """(n, 3, 32, 48) in [-1, 1]."""
    return to_float(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (COUNT, 3, 32, 48), np.uint8)))


def moments(vae: str, images: Tensor) -> Tensor:
    return load_autoencoder(vae).encode(images)


# Each writes a data set as its project does, and returns the moments that it means: of pictures, and mirrored or None.
Writer = Callable[[Path, str], tuple[Tensor, Tensor | None]]


def edm2_files(vae: str, images: Tensor | None = None) -> tuple[dict[str, bytes], Tensor]:
    encoded = moments(vae, pictures() / 2 + 0.5 if images is None else images)
    names = [f"{i:08d}"[:5] + f"/img-mean-std-{i:08d}.npy" for i in range(len(encoded))]
    files = {"dataset.json": json.dumps({"labels": list(zip(names, LABELS, strict=True))}).encode()}
    for name, each in zip(names, encoded, strict=True):
        buffer = io.BytesIO()
        np.save(buffer, each)
        files[name] = buffer.getvalue()
    return files, encoded


def edm2_zip(path: Path, vae: str, images: Tensor | None = None) -> tuple[Tensor, None]:
    files, encoded = edm2_files(vae, images)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return encoded, None


def edm2_folder(path: Path, vae: str) -> tuple[Tensor, None]:
    files, encoded = edm2_files(vae)
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return encoded, None


def sampled(vae: str, images: Tensor) -> Tensor:
    mean, std = moments(vae, images).chunk(2, dim=1)
    return (mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))).contiguous()


def as_moments(samples: Tensor) -> Tensor:
    return torch.cat([samples, torch.zeros_like(samples)], dim=1)


def lightning_dit(path: Path, vae: str) -> tuple[Tensor, Tensor]:
    path.mkdir()
    latents, flipped = sampled(vae, pictures()), sampled(vae, pictures().flip(-1))
    for number, rows in enumerate((slice(0, 7), slice(7, COUNT))):
        part = {"latents": latents[rows], "latents_flip": flipped[rows], "labels": torch.tensor(LABELS[rows])}
        save_file(part, path / f"latents_rank00_shard{number:03d}.safetensors", metadata={"dtype": "torch.float32"})
    statistics = {name: getattr(latents, name)(dim=[0, 2, 3], keepdim=True) for name in ("mean", "std")}
    torch.save(statistics, path / "latents_stats.pt")
    return as_moments(latents), as_moments(flipped)


def fast_dit(path: Path, vae: str) -> tuple[Tensor, None]:
    samples = sampled(vae, pictures())
    for folder in ("imagenet256_features", "imagenet256_labels"):
        (path / folder).mkdir(parents=True)
    for number, (sample, label) in enumerate(zip(samples, LABELS, strict=True)):
        np.save(path / f"imagenet256_features/{number}.npy", (sample[None] * SD).numpy())
        np.save(path / f"imagenet256_labels/{number}.npy", np.array([label]))
    return as_moments(samples), None


def mar(path: Path, vae: str) -> tuple[Tensor, Tensor]:
    both = [moments(vae, images) for images in (pictures(), pictures().flip(-1))]
    order = sorted(range(COUNT), key=lambda number: (LABELS[number], number))
    for number in order:
        (path / f"n{LABELS[number]}").mkdir(parents=True, exist_ok=True)
        mean_log = [torch.cat([m[number, :4], 2 * m[number, 4:].log()]).numpy() for m in both]
        np.savez(path / f"n{LABELS[number]}/{number:03d}.JPEG.npz", moments=mean_log[0], moments_flip=mean_log[1])
    return both[0][order], both[1][order]


WRITERS: dict[str, Writer] = {
    "edm2.zip": edm2_zip, "edm2": edm2_folder, "lightning": lightning_dit, "fast": fast_dit, "mar": mar,
}  # fmt: skip


def imported(source: Path, out: Path, vae: str, *words: str) -> LatentDataset:
    main([str(source), str(out), "--import", "--vae", vae, "--workers", "0", "--shard-size", "4", *words])
    return open_dataset(str(out))


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_imported_is_what_was_written(tmp_path, vae, caplog, name):
    written, flipped = WRITERS[name](tmp_path / name, vae)
    with caplog.at_level("INFO"):
        data = imported(tmp_path / name, tmp_path / "out", vae, "--verify")
    found = data.read(range(COUNT), [False] * COUNT)
    torch.testing.assert_close(found["moments"], written, rtol=1e-6, atol=1e-6)
    assert found["label"].tolist() == (sorted(LABELS) if name == "mar" else LABELS)
    assert data.class_names == (["n0", "n1", "n2"] if name == "mar" else None) and data.num_classes == 3
    assert data.has_flip == (flipped is not None) and data.latent_shape == (4, 4, 6)
    if flipped is not None:
        mirrored = data.read(range(COUNT), [True] * COUNT)["moments"]
        torch.testing.assert_close(mirrored, flipped, rtol=1e-6, atol=1e-6)
    assert "taken on trust" in caplog.text and ("standard deviation 0" in caplog.text) == (
        name in ("lightning", "fast")
    )
    plain = imported(tmp_path / name, tmp_path / "plain", vae, "--unconditional", "--workers", "2")
    assert plain.num_classes == 0 and (plain.read([0], [False])["label"] == -1).all()


@pytest.mark.parametrize("name", ["edm2.zip", "lightning", "mar"])
def test_decoding_gives_what_its_project_decodes(tmp_path, vae, name):
    """Through normalised latents, as a model learns them, in every way that samples are decoded."""
    written, _ = WRITERS[name](tmp_path / name, vae)
    spec = imported(tmp_path / name, tmp_path / "out", vae).latents
    means = written.chunk(2, dim=1)[0]
    with torch.no_grad():
        expected = AutoencoderKL.from_pretrained(vae).decode(means).sample
    expected = to_uint8((2 * expected - 1 if name.startswith("edm2") else expected).clamp(-1, 1))
    normalised = spec.normalise(means)
    if name == "lightning":
        assert normalised.mean((0, 2, 3)).abs().max() < 1e-5 and (normalised.std((0, 2, 3)) - 1).abs().max() < 1e-5
    else:
        assert spec.scale == SD

    model = tiny_model(in_channels=4, latents=spec.to_dict())
    model.save_pretrained(tmp_path / "model")
    pipeline = SiTPipeline.from_pretrained(tmp_path / "model")
    pipeline.save_pretrained(tmp_path / "pipeline")
    copy = shutil.copytree(vae, tmp_path / "copy of the autoencoder")
    for decoded in (
        load_autoencoder(spec).decode(normalised),
        open_generator(tmp_path / "model")[1].decode(normalised),
        open_generator(tmp_path / "model", str(copy))[1].decode(normalised),
        open_generator(tmp_path / "pipeline")[1].decode(normalised),
        pipeline._decode(normalised, "pt") * 2 - 1,
    ):
        assert (to_uint8(decoded).int() - expected.int()).abs().max() <= 1


def test_photographs_come_back_from_edm2s_latents_and_those_in_another_range_are_refused(tmp_path, shared, capsys):
    """With a real autoencoder, which EDM2 gives pictures in [0, 1]."""
    vae = str(shared / "data" / "taesd")
    with zipfile.ZipFile(shared / "data" / "sign-language-digits_10x206_100px.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith(".jpg"))[:: 2060 // COUNT][:COUNT]
        files = [Image.open(archive.open(name)).convert("RGB").resize((96, 96)) for name in names]
    images = to_float(torch.stack([torch.from_numpy(np.array(file)).permute(2, 0, 1) for file in files]))
    edm2_zip(tmp_path / "edm2.zip", vae, images / 2 + 0.5)
    data = imported(tmp_path / "edm2.zip", tmp_path / "out", vae)
    means = data.read(range(COUNT), [False] * COUNT)["moments"].chunk(2, dim=1)[0]
    decoded = load_autoencoder(data.latents).decode(data.latents.normalise(means))
    assert (decoded - images).abs().mean() < 0.1  # of 2; without the range it is 0.7
    edm2_zip(tmp_path / "repa.zip", vae, images)
    with pytest.raises(SystemExit):
        imported(tmp_path / "repa.zip", tmp_path / "other", vae)
    assert "EDM2 encodes pictures in [0, 1]" in capsys.readouterr().err


def replace_in_zip(path: Path, name: str, content: bytes | None) -> None:
    with zipfile.ZipFile(path) as archive:
        files = {each: archive.read(each) for each in archive.namelist()}
    files[name] = content
    with zipfile.ZipFile(path, "w") as archive:
        for each, kept in files.items():
            if kept is not None:
                archive.writestr(each, kept)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


SECOND = {  # the file of the second latent, and how a damaged one is named
    "edm2.zip": "00000/img-mean-std-00000001.npy",
    "edm2": "00000/img-mean-std-00000001.npy",
    "fast": "imagenet256_features/1.npy",
    "mar": "n0/004.JPEG.npz",
}


@pytest.mark.parametrize("content", [b"damaged", None, np.full((8, 4, 6), np.nan), np.zeros((8, 4, 4))])
@pytest.mark.parametrize("name", SECOND)
def test_bad_latents_are_counted_and_named(tmp_path, vae, capsys, caplog, name, content):
    WRITERS[name](tmp_path / name, vae)
    if isinstance(content, np.ndarray):
        array = content.astype(np.float32)
        array = array[None, :4] if name == "fast" and array.ndim == 3 else array
        buffer = io.BytesIO()
        np.savez(buffer, moments=array, moments_flip=array)
        content = buffer.getvalue() if name == "mar" else npy(array)
    if name == "edm2.zip":
        replace_in_zip(tmp_path / name, SECOND[name], content)
    elif content is None:
        (tmp_path / name / SECOND[name]).unlink()
    else:
        (tmp_path / name / SECOND[name]).write_bytes(content)
    if content is None and name in ("fast", "mar"):  # there is no list that would miss it
        if name == "mar":
            assert len(imported(tmp_path / name, tmp_path / "out", vae)) == COUNT - 1
            return
        with pytest.raises(SystemExit):
            imported(tmp_path / name, tmp_path / "out", vae)
        assert "imagenet256_labels holds 1.npy" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as caught:
        imported(tmp_path / name, tmp_path / "out", vae)
    assert caught.value.code == 2 and "1 of 11 pictures" in capsys.readouterr().err
    data = imported(tmp_path / name, tmp_path / "out", vae, "--max-bad", "1")
    assert len(data) == COUNT - 1 and SECOND[name] in caplog.text


def spoil(path: Path, **arrays: Tensor | None) -> None:
    tensors = {**load_file(path), **arrays}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


SHARD = "latents_rank00_shard001.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("lightning", lambda p: (p / SHARD).write_bytes(b"damaged"), "is damaged"),
        ("lightning", lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes()[:-9]), "is damaged"),
        ("lightning", lambda p: spoil(p / SHARD, labels=None), r"shard001.* expected latents and labels"),
        ("lightning", lambda p: spoil(p / SHARD, labels=torch.tensor([1, 2])), r"expected \(2, C, h, w\)"),
        ("lightning", lambda p: spoil(p / SHARD, labels=torch.tensor([1, 2, -3, 0])), "the label in row 9 is -3"),
        ("lightning", lambda p: spoil(p / SHARD, latents_flip=None), "have latents_flip and some do not"),
        ("lightning", lambda p: spoil(p / SHARD, latents=torch.zeros(4, 4, 4, dtype=torch.int8)), "has shape"),
        (
            "lightning",
            lambda p: torch.save({"mean": torch.ones(4)}, p / "latents_stats.pt"),
            "holds no statistics of 4",
        ),
        (
            "lightning",
            lambda p: torch.save({"mean": torch.ones(4), "std": torch.zeros(4)}, p / "latents_stats.pt"),
            "is not positive",
        ),
        ("lightning", lambda p: (p / "latents_stats.pt").write_bytes(b"damaged"), "latents_stats.pt is damaged"),
        ("fast", lambda p: np.save(p / "imagenet256_labels/3.npy", np.array([1, 2])), r"3.npy has shape \(2,\)"),
        ("fast", lambda p: np.save(p / "imagenet256_labels/3.npy", np.array([-1])), "the label in row 3 is -1"),
        ("fast", lambda p: (p / "imagenet256_labels/3.npy").write_bytes(b""), r"Cannot read .*3\.npy"),
        ("fast", lambda p: (p / "imagenet256_labels/3.npy").unlink(), r"imagenet256_features holds 3\.npy"),
        ("fast", lambda p: [(p / f"512_{kind}").mkdir() for kind in ("features", "labels")], "move all but one away"),
        ("edm2", lambda p: (p / "dataset.json").write_text('{"labels": [["a.npy", 1.5]]}'), r"label in row 0 is 1\.5"),
        ("edm2", lambda p: (p / "dataset.json").write_text("{"), "is not valid JSON"),
        ("edm2", lambda p: (p / "dataset.json").unlink(), "no latents of a layout"),
        ("edm2.zip", lambda p: p.write_bytes(p.read_bytes()[:-30]), "Cannot open .* as a zip"),
        ("edm2.zip", lambda p: replace_in_zip(p, "dataset.json", None), "no latents of a layout"),
        ("mar", lambda p: [file.write_bytes(b"damaged") for file in p.glob("*/*.npz")], "Cannot open .* as an npz"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path, vae, capsys, name, change, message):
    WRITERS[name](tmp_path / name, vae)
    change(tmp_path / name)
    with pytest.raises(SystemExit) as caught:
        imported(tmp_path / name, tmp_path / "out", vae)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_options_and_autoencoders_that_do_not_fit(tmp_path, vae, capsys):
    fast_dit(tmp_path / "fast", vae)
    other = str(small_kl(tmp_path / "xl", stages=4, scaling_factor=0.13025))
    wide = str(small_kl(tmp_path / "wide", stages=4, latent_channels=16, scaling_factor=SD))
    for words, message in (
        (["--flip"], "holds no mirrored latents"),
        (["--images"], "holds no pictures"),
        (["--teacher", "test_vit", "--teacher-weights", "random"], "holds no pictures"),
        (["--resolution", "32"], "latents of 32x48 pixels"),
        (["--vae", other], "multiplies latents by 0.18215"),
        (["--vae", wide], "expected floating point (16, h, w)"),
        (["--vae", "identity"], "multiplies latents by 0.18215"),
    ):
        with pytest.raises(SystemExit) as caught:
            imported(tmp_path / "fast", tmp_path / "out", vae, *words)
        assert caught.value.code == 2 and message in capsys.readouterr().err, words
    with pytest.raises(InputError, match="does not exist"):
        open_foreign(str(tmp_path / "nowhere"), load_autoencoder(vae).spec)


def test_latents_without_statistics_or_labels(tmp_path, vae):
    lightning_dit(tmp_path / "lightning", vae)
    (tmp_path / "lightning" / "latents_stats.pt").unlink()
    assert imported(tmp_path / "lightning", tmp_path / "out", vae).latents == load_autoencoder(vae).spec
    edm2_zip(tmp_path / "edm2.zip", vae)
    replace_in_zip(tmp_path / "edm2.zip", "dataset.json", b'{"labels": null}')
    data = imported(tmp_path / "edm2.zip", tmp_path / "null", vae)
    assert (len(data), data.num_classes) == (COUNT, 0)


def test_models_of_other_ranges_and_statistics_are_told_apart():
    spec = LatentSpec("vae", "a" * 64, 4, 8, SD)
    for change in ({"unit_range": True}, {"scale": (1.0, 2.0, 3.0, 4.0), "statistics": True}):
        other = LatentSpec.from_dict({**spec.to_dict(), **change})
        assert LatentSpec.from_dict(other.to_dict()) == other
        with pytest.raises(InputError, match=f"differ in {next(iter(change))}"):
            spec.require_same(other, "the model", "the data")
