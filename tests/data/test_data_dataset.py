"""Reading prepared latents: rows are what was written, and damage is named by file and row."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from sit_atconv.autoencoder import LatentSpec
from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.shards.format import ShardReader, encode_png, pack_images, shard_name, write_shard
from sit_atconv.data.shards.manifest import Manifest, load_manifest, save_manifest
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError

SPEC = LatentSpec("some/vae", "0" * 64, 4, 8, 0.5, 0.25)


def build(root, counts=(3, 0, 4), flip=True, images=True):
    """A data set whose sample i has latents full of i, mirrored ones full of -i, label i % 3, and a picture."""
    root.mkdir(exist_ok=True)
    shards, first = [], 0
    for number, count in enumerate(counts):
        value = torch.arange(first, first + count)
        tensors = {"labels": value % 3, "index": value * 10}
        tensors["moments"] = value.half().view(-1, 1, 1, 1).repeat(1, 8, 2, 3)
        tensors |= {"moments_flip": -tensors["moments"]} if flip else {}
        tensors |= pack_images([encode_png(crop(int(v))) for v in value]) if images else {}
        shards.append(write_shard(root / shard_name(number), tensors))
        first += count
    manifest = Manifest("src", (16, 24), SPEC, ["a", "b", "c"], 3, flip, images, 4, 12, first, True, shards)
    save_manifest(manifest, root)
    return root


def crop(value: int) -> np.ndarray:
    return np.random.default_rng(value).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def damage(path, **changes):
    """Rewrite tensors of a shard, the file's size unchanged."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({**tensors, **{name: change(tensors[name]) for name, change in changes.items()}}, path)


def test_rows_are_what_was_written(tmp_path):
    dataset = open_dataset(build(tmp_path), images=True)
    assert (len(dataset), dataset.latent_shape, dataset.num_classes) == (7, (4, 2, 3), 3)
    assert dataset.latents == SPEC and dataset.class_names == ["a", "b", "c"] and dataset.has_flip
    order, flips = [6, 0, 3, 2, 3], [False, True, True, False, False]
    for reader in (dataset, pickle.loads(pickle.dumps(dataset))):
        batch = reader.read(order, flips, images=True)
        assert batch["moments"].dtype == torch.float16 and batch["moments"].shape == (5, 8, 2, 3)
        assert batch["moments"][:, 0, 0, 0].tolist() == [6, 0, -3, 2, 3]
        assert batch["label"].tolist() == [0, 0, 0, 2, 0]
        for image, index, flip in zip(batch["image"], order, flips, strict=True):
            expected = crop(index)[:, ::-1] if flip else crop(index)
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert [dataset.source_index(i) for i in range(7)] == [0, 10, 20, 30, 40, 50, 60]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of memory maps")
def test_rows_are_read_straight_from_the_page_cache(tmp_path):
    """A row is a view of the mapped file; reading a batch copies it once, into the batch."""
    root = build(tmp_path)
    (files, rows), *_ = load_manifest(root).series
    reader = ShardReader(root / files[2].name, files[2].count, rows, images=True)
    maps = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [fields[0].split("-") for fields in maps if len(fields) > 5 and fields[5] == str(root / files[2].name)]
    for view in (reader.row("moments", 3), reader.row("moments_flip", 0), reader.labels):
        assert any(int(low, 16) <= view.data_ptr() < int(high, 16) for low, high in mapped)


class SharedMemory(Dataset):
    """Which tensors of a batch lie in shared memory when a worker is about to send them."""

    def __init__(self, dataset):
        self._dataset = dataset

    def __getitem__(self, indices):
        batch = self._dataset.read(indices, [False] * len(indices), images=True)
        return {name: tensor.is_shared() for name, tensor in batch.items()} | {"moments.0": batch["moments"][0].clone()}


def test_workers_fill_batches_where_they_are_sent_from(tmp_path):
    dataset = open_dataset(build(tmp_path), images=True)
    (batch,) = DataLoader(SharedMemory(dataset), batch_size=None, sampler=[[5, 1]], num_workers=1)
    assert batch["moments"] and batch["image"]
    assert torch.equal(batch["moments.0"], dataset.read([5], [False])["moments"][0])


def test_the_pictures_of_a_data_set_are_a_source(tmp_path):
    source = open_source(build(tmp_path))
    assert source.kind == "prepared" and len(source) == 7 and source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    np.testing.assert_array_equal(source[4].image, crop(4))
    assert source[4].label == 1 and source[4].name.endswith("shard-00002.safetensors row 1")
    with pytest.raises(InputError, match="latents without pictures"):
        open_source(build(tmp_path / "bare", images=False))


def test_what_was_not_prepared_is_not_read(tmp_path):
    root = build(tmp_path, flip=False, images=False)
    with pytest.raises(InputError, match=r"no mirrored latents.*--flip"):
        open_dataset(root).read([0], [True])
    with pytest.raises(InputError, match=r"no pictures.*--images"):
        open_dataset(root, images=True)
    with pytest.raises(InputError, match="not a prepared data set"):
        open_dataset(tmp_path / "elsewhere")


def test_missing_truncated_and_incomplete(tmp_path):
    root = build(tmp_path)
    path = root / shard_name(2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"shard-00002.* bytes, not .*truncated"):
        open_dataset(root)
    path.unlink()
    with pytest.raises(InputError, match=r"shard-00002\.safetensors is missing"):
        open_dataset(root)
    path.write_bytes(whole[::-1])
    with pytest.raises(InputError, match=r"Cannot read shard .*shard-00002"):
        open_dataset(root).read([4], [False])
    manifest = json.loads((root / "dataset.json").read_text())
    for change, message in (
        ({"complete": False}, "not complete"),
        ({"version": 99}, "not a data set of version 1"),
        ({"shards": None}, "shards: Expected `array`, got `null`"),
        ({"latents": {}}, "latents: Object missing required field `autoencoder`"),
        ({"shards": [{**manifest["shards"][0], "count": -1}]}, r"shards\[0\].count: Expected `int` >= 0"),
        ({"num_classes": 10**30}, "num_classes: Expected `int` <= 1000000"),
        ({"latents": {**manifest["latents"], "zoom": 1}}, "latents: unknown key 'zoom'"),
        ({"token_files": {"tokens_9": []}}, "token_files.tokens_9 does not belong"),
    ):
        (root / "dataset.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(InputError, match=message):
            open_dataset(root)
    (root / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        open_dataset(root)


def test_damaged_rows_are_named(tmp_path):
    root = build(tmp_path)

    def spoil(value):
        def change(tensor):
            tensor[1] = value
            return tensor

        return change

    damage(root / shard_name(2), moments=spoil(float("nan")), labels=spoil(3))
    dataset = open_dataset(root)
    assert dataset.read([0, 3], [False, False])["label"].tolist() == [0, 0]
    with pytest.raises(InputError, match=r"shard-00002\.safetensors row 1: the latent holds NaN"):
        dataset.read([0, 4], [False, False])
    with pytest.raises(InputError, match=r"shard-00002\.safetensors row 1: label 3 is outside 0…2"):
        dataset.read([0, 4], [False, True])


def test_shards_of_another_shape_are_refused(tmp_path):
    root = build(tmp_path)
    manifest = json.loads((root / "dataset.json").read_text())
    manifest["latents"]["channels"] = 16
    (root / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"'moments' is torch.float16 \(3, 8, 2, 3\), expected .*\(3, 32, 2, 3\)"):
        open_dataset(root).read([0], [False])


def repa(root, labels=((0, 5), (1, 0), (2, 5))):
    for index in range(3):
        for folder in ("images", "vae-sd"):
            (root / folder / "00000").mkdir(parents=True, exist_ok=True)
        np.save(root / f"vae-sd/00000/img-mean-std-{index:08d}.npy", np.full((8, 2, 3), index, np.float32))
        Image.fromarray(crop(index)).save(root / f"images/00000/img{index:08d}.png")
    pairs = None if labels is None else [[f"00000/img-mean-std-{i:08d}.npy", label] for i, label in labels]
    (root / "vae-sd/dataset.json").write_text(json.dumps({"labels": pairs}))
    return root


def test_repa_directories_are_read_as_they_are(tmp_path):
    dataset = open_dataset(repa(tmp_path), images=True)
    assert (len(dataset), dataset.latent_shape, dataset.num_classes, dataset.has_flip) == (3, (4, 2, 3), 6, False)
    assert (dataset.latents.scale, dataset.latents.downscale) == (0.18215, 8)
    batch = dataset.read([2, 1], [False, False], images=True)
    assert batch["moments"].dtype == torch.float32 and batch["moments"][:, 0, 0, 0].tolist() == [2, 1]
    assert batch["label"].tolist() == [5, 0]
    np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0).numpy(), crop(2))
    source = open_source(tmp_path)
    assert source.kind == "repa" and source.labels.tolist() == [5, 0, 5]
    np.testing.assert_array_equal(source[1].image, crop(1))


def test_repa_without_labels(tmp_path):
    dataset = open_dataset(repa(tmp_path, labels=None))
    assert dataset.num_classes == 0 and dataset.read([0], [False])["label"].tolist() == [-1]


def test_damaged_repa_directories(tmp_path):
    root = repa(tmp_path)
    (root / "vae-sd/00000/img-mean-std-00000001.npy").write_bytes(b"x")
    np.save(root / "vae-sd/00000/img-mean-std-00000002.npy", np.zeros((4, 2, 3), np.float32))
    for index in (1, 2):
        with pytest.raises(InputError, match=f"img-mean-std-0000000{index}"):
            open_dataset(root).read([index], [False])
    repa(root, labels=((0, 1), (0, 2)))
    with pytest.raises(InputError, match="1 names more than once"):
        open_dataset(root)


def test_digits_in_memory():
    dataset = open_dataset("digits:train@16", images=True)
    assert dataset.latent_shape == (1, 16, 16) and dataset.latents.autoencoder == "identity"
    batch = dataset.read([0, 5], [False, True], images=True)
    source = open_source("digits:train@16")
    np.testing.assert_array_equal(batch["image"][0].permute(1, 2, 0).numpy(), source[0].image)
    np.testing.assert_array_equal(batch["image"][1].permute(1, 2, 0).numpy(), source[5].image[:, ::-1])
    assert batch["label"].tolist() == [source[0].label, source[5].label] and (batch["moments"][:, 1] == 0).all()
