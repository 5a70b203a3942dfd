"""Teacher tokens kept beside the latents: the same training as with the teacher itself, without running it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_autoencoder import small_kl
from training_runs import losses, run_tiny

import sit_atconv.data.shards.files as shard_files
from sit_atconv.alignment import CachedTeacher, Teacher, find_tokens
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.prepare.__main__ import main
from sit_atconv.data.prepare.options import PrepareOptions
from sit_atconv.data.prepare.preparation import prepare
from sit_atconv.data.sampler import training_loader
from sit_atconv.data.shards.files import ShardFiles
from sit_atconv.data.shards.manifest import Row, load_manifest
from sit_atconv.data.shards.verify import verify_dataset
from sit_atconv.errors import InputError
from sit_atconv.runtime.files import sha256_of_file

# A class token; a class token and four registers, seen at patch 14: grids of 2 x 3 tokens for pictures of 32 x 48.
TEACHERS = (("test_vit", "random"), ("vit_small_patch14_reg4_dinov2.lvd142m", "random"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("photos")
    for number in range(10):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return str(root)


@pytest.fixture(scope="module")
def prepared(photos, tmp_path_factory) -> dict[str, str]:
    """The photographs as latents of a small autoencoder and as pixels, with mirror images and both teachers' tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    vaes = {"latents": str(small_kl(folder / "vae")), "pixels": "identity"}
    for name, vae in vaes.items():
        shapes = {"resolution": (32, 48), "shard_size": 4, "workers": 0}
        prepare(
            PrepareOptions(photos, str(folder / name), vae=vae, flip=True, images=True, teachers=TEACHERS, **shapes)
        )
    return {name: str(folder / name) for name in vaes}


def aligned(path: str, cached: bool, **options) -> str:
    teachers = [{"name": name, "weights": weights, "cached": cached} for name, weights in TEACHERS]
    alignment = {"block": 1, "projector_width": 16, "teachers": teachers, **options}
    return f"--data.path {path} --data.flip true --alignment {json.dumps(alignment, separators=(',', ':'))}"


@pytest.mark.parametrize("kind", ["latents", "pixels"])
@pytest.mark.parametrize("flip", [False, True])
def test_cached_tokens_are_the_teachers_own(prepared, kind, flip):
    """But for fp16: half a unit in its last place is at most 2⁻¹¹ of the value."""
    dataset = open_dataset(prepared[kind], images=True)
    batch = dataset.read(range(10), [flip] * 10, images=True, teachers=[0, 1])
    for number, (name, weights) in enumerate(TEACHERS):
        teacher, cached = Teacher(name, weights), CachedTeacher(dataset.teachers[number], number)
        assert dataset.teachers[number] == teacher.spec(32, 48, flip=True)
        for grid in ((2, 3), (4, 6), (1, 2), (5, 3)):
            expected = teacher.targets(batch, grid)
            rounding = float(expected.abs().max()) * 2**-11
            torch.testing.assert_close(cached.targets(batch, grid), expected, rtol=0, atol=rounding)


@pytest.mark.parametrize("kind", ["latents", "pixels"])
@pytest.mark.parametrize("options", [{}, {"variant": "irepa"}])
def test_training_is_the_same_and_runs_no_teacher(prepared, tmp_path, monkeypatch, kind, options):
    run_tiny(tmp_path / "live", f"{aligned(prepared[kind], False, **options)} --preview.every null")
    monkeypatch.setattr("sit_atconv.training.session.build.Teacher", None)  # nobody makes one
    run_tiny(tmp_path / "cached", f"{aligned(prepared[kind], True, **options)} --preview.every null")
    live, cached = (np.array(losses(tmp_path / name), dtype=float) for name in ("live", "cached"))
    assert np.abs(live[:, 3]).max() > 5e-3  # the alignment term is there
    np.testing.assert_allclose(cached, live, rtol=1e-3, atol=1e-4)


def test_alignment_stops_when_it_is_to(prepared, tmp_path, monkeypatch):
    extra = "--training.accumulation 2 --preview.every null --log.every 1"
    seen, tokens = [], Teacher.own_tokens
    monkeypatch.setattr(Teacher, "own_tokens", lambda self, images: seen.append(len(images)) or tokens(self, images))
    run_tiny(tmp_path / "run", f"{aligned(prepared['latents'], False, stop_after=2)} {extra}")
    terms = [line[3] for line in losses(tmp_path / "run")]
    assert len(seen) == 2 * 2 * 2  # steps, micro-batches, teachers
    assert all(terms[:2]) and terms[2:] == [0] * 4


def test_command_line_and_verification(photos, tmp_path, capsys):
    weights, out = tmp_path / "weights.safetensors", tmp_path / "out"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    common = [photos, str(out), "--resolution", "32", "--vae", "identity", "--workers", "0"]
    main([*common, "--teacher", "test_vit", "--teacher-weights", str(weights), "--verify"])
    (spec,) = load_manifest(out).teachers
    assert (spec.weights, len(spec.weights_hash), spec.grid, spec.flip) == (str(weights), 64, (2, 2), False)
    with pytest.raises(InputError, match="unmirrored pictures only"):
        training_loader(open_dataset(str(out)), batch_size=2, seed=0, flip=True, teachers=[0])

    shard = out / "shard-00000.safetensors"
    tensors = load_file(shard)
    tensors["tokens_0"][3, 2, 1] = float("nan")
    save_file(tensors, shard)
    with pytest.raises(InputError, match=r"shard-00000.safetensors row 3: tokens_0 holds NaN"):
        verify_dataset(str(out))

    mistakes = (
        (["--teacher", "test_vit"], "begun with other settings (teachers"),
        (["--teacher", "test_vit", "--teacher", "test_vit", *["--teacher-weights", "random"] * 2], "name one twice"),
        (["--teacher", "resnet18", "--teacher-weights", "random"], "not a vision transformer"),
        (["--teacher", "test_vit", *["--teacher-weights", "random"] * 2], "2 times for 1 teachers"),
    )
    for words, message in mistakes:
        words = words if "--teacher-weights" in words else [*words, "--teacher-weights", "random"]
        with pytest.raises(SystemExit) as caught:
            main([*common, *words])
        error = capsys.readouterr().err
        assert caught.value.code == 2 and message in error and "Traceback" not in error


def test_tokens_of_another_teacher_are_refused(prepared, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    spec = Teacher("test_vit", "random").spec(32, 32, flip=False)
    hashed = dataclasses.replace(spec, weights="gone", weights_hash=sha256_of_file(tmp_path / "a.safetensors"))
    assert find_tokens("test_vit", str(tmp_path / "a.safetensors"), [hashed], "data") == 0
    assert find_tokens("test_vit", "gone", [hashed], "data") == 0
    for cached, name, weights, message in (
        ([spec], "test_vit2", "random", r"no tokens of the teacher test_vit2 .of others: test_vit"),
        ([], "test_vit", "random", r"of others: none"),
        ([spec], "test_vit", "hub", "with the weights 'random'"),
        ([hashed], "test_vit", str(tmp_path / "b.safetensors"), "with the weights 'gone'"),
        ([hashed], "test_vit", "elsewhere", "with the weights 'gone'"),
    ):
        with pytest.raises(InputError, match=message):
            find_tokens(name, weights, cached, "data")
    with pytest.raises(InputError, match=r"no tokens of the teacher test_vit2.*--teacher test_vit2"):
        run_tiny(tmp_path / "run", aligned(prepared["latents"], True).replace('"test_vit"', '"test_vit2"'))
    assert not (tmp_path / "run").exists()


def test_shards_whose_tokens_have_another_grid_are_refused(prepared, tmp_path):
    manifest = json.loads((open_dataset(prepared["latents"])._directory / "dataset.json").read_text())
    manifest["teachers"][0]["grid"] = [3, 3]
    for shard in manifest["shards"]:
        (tmp_path / shard["name"]).symlink_to(open_dataset(prepared["latents"])._directory / shard["name"])
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"'tokens_0' is torch.float16 \(4, 6, 64\), expected .*\(4, 9, 64\)"):
        open_dataset(str(tmp_path)).read([0], [False], teachers=[0])
    manifest["teachers"][0].pop("grid")
    (tmp_path / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"teachers\[0\].*missing required field `grid`"):
        open_dataset(str(tmp_path))


@pytest.fixture
def bare(photos, tmp_path) -> Path:
    """The photographs with pictures and without teachers, in shards of four, four and two."""
    vae = str(small_kl(tmp_path / "vae"))
    shapes = {"resolution": (32, 48), "shard_size": 4, "workers": 0}
    prepare(PrepareOptions(photos, str(tmp_path / "bare"), vae=vae, flip=True, images=True, **shapes))
    return tmp_path / "bare"


def added(root: Path, *words: str) -> None:
    main([str(root), "--workers", "0", *words])


ADD = [word for name, weights in TEACHERS for word in ("--teacher", name, "--teacher-weights", weights)]


def test_teachers_added_later_are_those_given_at_once(bare, prepared, tmp_path):
    """And the shards are not touched; the commands that made the data, and added the teachers, find all there."""
    before = {path.name: path.read_bytes() for path in bare.glob("*.safetensors")}
    added(bare, *ADD[:4], "--batch-size", "3")
    added(bare, *ADD, "--verify")
    rows, flips = range(10), [False, True] * 5
    once, later = open_dataset(prepared["latents"]), open_dataset(str(bare))
    assert later.teachers == once.teachers
    expected, found = (each.read(rows, flips, images=True, teachers=[0, 1]) for each in (once, later))
    for name in ("tokens_0", "tokens_1", "image", "label"):
        assert torch.equal(found[name], expected[name]), name
    assert all((bare / name).read_bytes() == content for name, content in before.items())
    assert len(list(bare.iterdir())) == 1 + 3 * 3

    names = sorted(path.name for path in bare.iterdir())
    ages = [(bare / name).stat().st_mtime_ns for name in names]
    added(bare, *ADD)
    settings = load_manifest(bare)
    prepare(
        PrepareOptions(
            settings.source, str(bare), (32, 48), settings.latents.autoencoder, flip=True, images=True, shard_size=4
        )
    )
    assert [(bare / name).stat().st_mtime_ns for name in names] == ages
    run_tiny(tmp_path / "run", f"{aligned(str(bare), True)} --preview.every null")


def test_adding_goes_on_where_it_was_interrupted(bare, monkeypatch):
    written, write = [], shard_files.write_shard

    def at_most(count):
        def interrupted(path, tensors):
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(path.name)
            return write(path, tensors)

        return interrupted

    names = [f"shard-0000{number}.tokens_0.safetensors" for number in range(3)]
    monkeypatch.setattr(shard_files, "write_shard", at_most(1))
    with pytest.raises(SystemExit):
        added(bare, *ADD[4:])  # another teacher, whose tokens are not to be taken for those of the next
    assert load_manifest(bare).teachers == [] and written == names[:1]
    monkeypatch.setattr(shard_files, "write_shard", at_most(3))
    with pytest.raises(SystemExit):
        added(bare, *ADD[:4])
    assert written == names[:1] + names[:2]
    assert open_dataset(str(bare)).read([9], [True], images=True)["moments"].shape == (1, 8, 16, 24)  # as before
    monkeypatch.setattr(shard_files, "write_shard", at_most(99))
    added(bare, *ADD[:4])
    assert written == names[:1] + names
    verify_dataset(str(bare))
    assert [spec.name for spec in load_manifest(bare).teachers] == ["test_vit"]


def test_a_note_does_not_outlive_the_file_it_describes(tmp_path, monkeypatch):
    """Files of two teachers have equal names and may have equal sizes."""
    rows = {"tokens_0": Row(torch.float16, (1, 2))}
    first, second = (
        ShardFiles(tmp_path, rows, "tokens_0", lambda shard, name=name: {"teacher": name})
        for name in ("first", "second")
    )
    tensors = {"tokens_0": torch.zeros(1, 1, 2).half(), "labels": torch.tensor([0]), "index": torch.tensor([0])}
    first.write(0, [0], tensors, [])
    assert first.missing([0]) == [] and second.missing([0]) == [0]

    def interrupted(path, values):
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_files, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        second.write(0, [0], tensors, [])
    assert first.missing([0]) == second.missing([0]) == [0]


def test_faults_of_added_tokens_are_named(bare, capsys):
    added(bare, *ADD[:4])
    files = sorted(bare.glob("*.tokens_0.safetensors"))
    whole = [file.read_bytes() for file in files]
    flipped = bytearray(whole[0])
    flipped[-1] ^= 64
    files[0].write_bytes(flipped)
    files[1].write_bytes(whole[1][:-1])
    files[2].unlink()
    with pytest.raises(SystemExit):
        added(bare, "--verify")
    error = capsys.readouterr().err
    for fault in (
        "0.tokens_0.safetensors: the checksum",
        "1.tokens_0.safetensors: ",
        "2.tokens_0.safetensors: missing",
    ):
        assert fault in error
    with pytest.raises(InputError, match=r"tokens_0\.safetensors is .*truncated"):
        open_dataset(str(bare))
    for file, content in zip(files, (whole[1], whole[0], whole[2]), strict=True):
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"00000\.tokens_0\.safetensors: holds other samples than shard-00000"):
        verify_dataset(str(bare))


def test_teachers_that_cannot_be_added(bare, photos, tmp_path, capsys):
    prepare(PrepareOptions(photos, str(tmp_path / "plain"), (32, 48), str(tmp_path / "vae"), workers=0))
    added(bare, *ADD[:4])
    for words, message in (
        ([str(tmp_path / "plain"), *ADD[:4]], "holds no pictures"),
        ([str(tmp_path / "none"), *ADD[:4]], "dataset.json: No such file"),
        ([str(bare), "--teacher", "test_vit"], "with the weights 'random', not 'hub'"),
        ([str(bare), *ADD[:4], "--max-bad", "2", "--images"], "--images, --max-bad would do nothing"),
        ([str(bare)], "OUT is missing"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2 and message in capsys.readouterr().err
    prepare(PrepareOptions(photos, str(tmp_path / "pixels"), (32, 48), "identity", workers=0))
    added(tmp_path / "pixels", *ADD[:4])
    for root, message in ((tmp_path / "pixels", "tokens of unmirrored"), (tmp_path / "plain", "holds no pictures")):
        with pytest.raises(SystemExit):
            added(root, *ADD[:4], "--flip")
        assert message in capsys.readouterr().err
    settings = load_manifest(bare)
    again = {"flip": True, "images": True, "shard_size": 4, "teachers": TEACHERS}
    with pytest.raises(InputError, match=rf"Add teachers by: .* {bare} --teacher NAME"):
        prepare(PrepareOptions(photos, str(bare), (32, 48), settings.latents.autoencoder, **again))


@pytest.mark.slow
def test_two_processes_add_what_one_adds(bare, tmp_path):
    shutil.copytree(bare, tmp_path / "one")
    added(tmp_path / "one", *ADD[:4])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launcher, "-m", "sit_atconv.data.prepare", str(bare), "--workers", "0", *ADD[:4]]
    subprocess.run(command, check=True, env=environment)
    contents = [{path.name: path.read_bytes() for path in root.iterdir()} for root in (bare, tmp_path / "one")]
    assert contents[0] == contents[1]
