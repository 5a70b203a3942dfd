"""Training of image networks: exact resume, keyed augmentation, mixing, averages, validation, and bad input."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import assert_same_checkpoint, checkpoint_tensors, fresh_accelerate, log_lines

from sit_atconv.config import AugmentationConfig, ImageConfig, parse_command_line
from sit_atconv.data.sampler import index_at
from sit_atconv.errors import InputError
from sit_atconv.randomness import Stream
from sit_atconv.zoo.train.__main__ import main
from sit_atconv.zoo.train.augmentation import Augmented, Mixing, keyed_globals, training_transform
from sit_atconv.zoo.train.session import build_session
from sit_atconv.zoo.train.trainer import train
from sit_atconv.zoo.validate.__main__ import main as validate
from sit_atconv.zoo.validate.pictures import open_pictures
from sit_atconv.zoo.validate.scoring import View

ROOT = Path(__file__).parents[2]
CLASSES, EACH = 3, 8
EVERYTHING = (
    "--augmentation.auto rand-m9-mstd0.5-inc1 --augmentation.erasing 0.5 --augmentation.mixup 0.8 "
    "--augmentation.cutmix 1.0 --augmentation.smoothing 0.1 --augmentation.repeats 3 --model.drop_path_rate 0.3"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of 40×36 pixels: noise around a colour of the class."""
    root, numbers = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label in range(CLASSES):
        (root / f"class{label}").mkdir()
        for number in range(EACH):
            noise = numbers.integers(0, 120, (36, 40, 3)) + 60 * label
            Image.fromarray(noise.astype(np.uint8)).save(root / f"class{label}" / f"{number}.png")
    return root


def words(pictures: Path, extra: str = "") -> list[str]:
    tiny = (
        f"--data.path {pictures} --data.heldout 0.25 --data.image_size 32 --data.workers 0 --model.name attnet_xxs "
        "--training.steps 4 --training.batch_size 6 --training.precision no --training.ema_decay 0.5 --log.every 1 "
        "--log.checkpoint_every 2 --log.keep null --validation.every 2 --validation.batch_size 4"
    )
    return f"{tiny} {extra}".split()


def run(pictures: Path, folder: Path, extra: str = "") -> None:
    fresh_accelerate()
    train(parse_command_line(words(pictures, extra), kind=ImageConfig)[0], folder)


def session_of(pictures: Path, folder: Path, extra: str = ""):
    fresh_accelerate()
    return build_session(parse_command_line(words(pictures, extra), kind=ImageConfig)[0], folder)


def numbers(folder: Path) -> list[dict]:
    """The lines of a log without speeds."""
    speed = ("second", "memory", "hours", "images_per")
    return [{k: v for k, v in line.items() if not any(word in k for word in speed)} for line in log_lines(folder)]


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with everything that is random, uninterrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(pictures, folder, EVERYTHING)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_continues_bit_for_bit_whatever_the_workers(whole, pictures, tmp_path, monkeypatch, workers):
    from sit_atconv.zoo.train.trainer import ImageTrainer

    step = ImageTrainer.step

    def killed(self: ImageTrainer) -> None:
        if self.position.step == 3:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patched:
        patched.setattr(ImageTrainer, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            run(pictures, tmp_path / "run", EVERYTHING)
    assert len(numbers(tmp_path / "run")) > 3  # step 3 was logged, and is taken again
    torch.manual_seed(1), random.seed(1), np.random.seed(1)  # no state of this process counts
    run(pictures, tmp_path / "run", f"{EVERYTHING} --data.workers {workers}")
    notes = [line for line in numbers(tmp_path / "run") if str(line.get("note")).startswith("data.workers")]
    assert [line for line in numbers(tmp_path / "run") if line not in notes] == numbers(whole)
    for name in ("step-0000002", "step-0000004"):
        assert_same_checkpoint(whole / "checkpoints" / name, tmp_path / "run" / "checkpoints" / name)


def test_the_command_stops_on_sigterm_and_goes_on(whole, pictures, tmp_path):
    command = [sys.executable, "-m", "sit_atconv.zoo.train", *words(pictures, EVERYTHING), "--run", tmp_path / "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "log.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait() in (0, 143)  # the last step may have been quicker
    run(pictures, tmp_path / "run", EVERYTHING)
    last = "checkpoints/step-0000004"
    assert_same_checkpoint(whole / last, tmp_path / "run" / last)


def test_two_processes_see_the_pictures_of_one(pictures, tmp_path):
    """Each sees half of every batch, as one process does that takes the batch in two micro-batches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    extra = f"{EVERYTHING} --training.steps 2 --training.batch_size 8"
    command = [sys.executable, "-m", "sit_atconv.zoo.train", *words(pictures, extra), "--run", tmp_path / "two"]
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **place, "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen([str(word) for word in command], env=environment, stderr=subprocess.PIPE))
    try:
        for process in processes:
            _, said = process.communicate(timeout=240)
            assert process.returncode == 0, said.decode()
    finally:
        for process in processes:
            process.kill()
    run(pictures, tmp_path / "one", f"{extra} --training.accumulation 2")
    one, two = ([line for line in numbers(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    assert len(one) == len(two) == 2
    for ours, theirs in zip(one, two, strict=True):
        assert (ours["loss"], ours["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=1e-4)
    assert {"top1", "top1_raw"} <= numbers(tmp_path / "two")[-1].keys()


def test_a_picture_is_augmented_by_its_position_alone(pictures):
    settings = AugmentationConfig(auto="rand-m9-mstd0.5-inc1", erasing=0.5, repeats=3)
    view = View(32, "bicubic", 1.0, (0.5,) * 3, (0.5,) * 3)
    shown = Augmented(open_pictures(str(pictures)), training_transform(settings, view), 7, 3)
    together = shown[list(range(12))]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert torch.equal(shown[[5, 4]]["image"], together["image"][[5, 4]])
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert together["index"].tolist() == [index_at(p // 3, CLASSES * EACH, 7) for p in range(12)]
    assert not torch.equal(together["image"][0], together["image"][1])  # one picture, two augmentations


def test_posterize_to_no_bits_is_black_as_it_was_with_older_versions_of_pillow():
    settings = AugmentationConfig(auto="rand-m10-n1-p1-inc1")
    transform = training_transform(settings, View(8, "bicubic", 1.0, (0.5,) * 3, (0.5,) * 3))
    operations = [each for step in transform.transforms for each in getattr(step, "ops", ())]
    posterize = next(each for each in operations if "osterize" in each.name)
    posterize.prob, posterize.magnitude = 1.0, 10
    assert not np.asarray(posterize(Image.new("RGB", (4, 4), (200, 100, 50)))).any()


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_have_the_shares_of_the_pixels(mixup, cutmix):
    """Pictures of one colour each: what they hold of one another can be read off."""
    mixing = Mixing(AugmentationConfig(mixup=mixup, cutmix=cutmix, smoothing=0.1), 4, seed=0)
    for position in range(20):
        images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).clone()
        mixed, targets = mixing(images, torch.arange(4), position)
        again, same = mixing(torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16).clone(), torch.arange(4), position)
        assert torch.equal(mixed, again) and torch.equal(targets, same)
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 4)
        share = (3 - mixed[0].mean()) / 3  # of picture 0 in the first: the rest is picture 3
        assert targets[0, 0].item() == pytest.approx(0.9 * share.item() + 0.025, abs=1e-5)
        assert targets[0, 1].item() == pytest.approx(0.025)


def test_labels_are_smoothed_where_nothing_is_mixed():
    mixing = Mixing(AugmentationConfig(smoothing=0.2), 4, seed=0)
    images, targets = mixing(torch.ones(3, 3, 2, 2), torch.tensor([0, 1, 3]), 0)
    assert torch.equal(images, torch.ones(3, 3, 2, 2))
    assert targets[2].tolist() == pytest.approx([0.05, 0.05, 0.05, 0.85])


def test_the_average_has_weights_and_statistics(whole):
    """The average after step 4 is half the weights then, a quarter those after step 3, and of step 2 the rest.

    Of statistics steps 3 and 4 count 9/13 and 9/14.
    """
    first, last = (load_file(whole / "checkpoints" / f"step-000000{n}" / "model" / "model.safetensors") for n in (2, 4))
    raw = load_file(whole / "checkpoints" / "step-0000004" / "weights.safetensors")
    assert {f"model.{name}" for name in last} == raw.keys()
    assert last["stem.0.1.num_batches_tracked"] == 4 == raw["model.stem.0.1.num_batches_tracked"]
    for name, w3, w4 in (("head.fc.weight", 0.5, 0.5), ("stem.0.1.running_var", 9 / 13, 9 / 14)):
        before = (last[name] - w4 * raw[f"model.{name}"]) / (1 - w4)  # the average after step 3
        third = (before - (1 - w3) * first[name]) / w3  # the weights after step 3
        assert not torch.equal(third, raw[f"model.{name}"]) and (third - raw[f"model.{name}"]).abs().max() < 0.5


def test_a_bad_step_leaves_statistics_alone(pictures, tmp_path, monkeypatch):
    from sit_atconv.zoo.train import trainer

    prepare = trainer.prepare_inputs

    def spoilt(session, batch):
        images, targets = prepare(session, batch)
        return (images * torch.nan if int(batch["position"][0]) in (0, 12) else images), targets

    monkeypatch.setattr(trainer, "prepare_inputs", spoilt)
    run(pictures, tmp_path / "run", "--optimizer.name sgd --log.checkpoint_every 1 --training.batch_size 6")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert_same_checkpoint(checkpoints / "step-0000002", checkpoints / "step-0000003")
    assert all(tensor.isfinite().all() for tensor in checkpoint_tensors(checkpoints / "step-0000004").values())
    assert numbers(tmp_path / "run")[-1]["top1"] >= 0


def test_recomputed_blocks_count_a_batch_once(pictures, tmp_path):
    same = "--model.name acmix_resnet26 --training.steps 2 --training.accumulation 2"
    run(pictures, tmp_path / "kept", same)
    run(pictures, tmp_path / "recomputed", f"{same} --training.gradient_checkpointing true")
    kept, recomputed = (tmp_path / name / "checkpoints" / "step-0000002" for name in ("kept", "recomputed"))
    assert_same_checkpoint(kept, recomputed)
    assert load_file(kept / "weights.safetensors")["model.stages.0.blocks.0.bn1.num_batches_tracked"] == 4


def test_the_run_s_model_is_timm_s(whole, pictures, tmp_path):
    """By name, as a folder of timm, and by the command, whose accuracies are those of the literal computation."""
    folder = whole / "checkpoints" / "latest" / "model"
    model = timm.create_model("attnet_xxs", num_classes=CLASSES, checkpoint_path=folder / "model.safetensors").eval()
    if Version(timm.__version__) >= Version("1.0.26"):  # earlier ones unpickle every file of a folder
        same = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        assert same.pretrained_cfg["input_size"] == [3, 32, 32]
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(model(x), same(x))

    validate([str(folder), "--data", str(pictures), "--workers", "0", "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    right, loss = 0, 0.0
    for label in range(CLASSES):
        for number in range(EACH):
            picture = Image.open(pictures / f"class{label}" / f"{number}.png")
            picture = picture.resize((40, 36), Image.Resampling.BICUBIC)  # 36 is ⌊32 / 0.875⌋
            pixels = torch.from_numpy(np.asarray(picture)[2:34, 4:36].copy()).permute(2, 0, 1) / 255
            mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
            with torch.no_grad():
                logits = model(((pixels - mean) / std)[None])[0]
            right, loss = right + int(logits.argmax() == label), loss - logits.log_softmax(0)[label].item()
    assert found["top1"] == pytest.approx(100 * right / 24) and found["loss"] == pytest.approx(loss / 24, rel=1e-4)
    assert found["top5"] == 100 and found["images"] == 24


def test_the_log_s_accuracy_is_that_of_the_command(whole, pictures, tmp_path):
    latest = whole / "checkpoints" / "latest" / "model"
    line = numbers(whole)[-1]
    for weights, ending in ((["--weights", "raw"], "_raw"), ([], "")):
        out = ["--json", str(tmp_path / "o.json"), "--workers", "0"]
        validate([str(latest), "--data", str(pictures), "--share", "0.25", *weights, *out])
        found = json.loads((tmp_path / "o.json").read_text())
        assert found["images"] == 6 and found["top1"] == pytest.approx(line[f"top1{ending}"])
        assert found["loss"] == pytest.approx(line[f"heldout_loss{ending}"], rel=1e-5)


def test_released_files_are_read_and_hold_two_sets_of_weights(whole, pictures, tmp_path):
    model = timm.create_model("attnet_xxs", num_classes=CLASSES)
    averaged = load_file(whole / "checkpoints" / "latest" / "model" / "model.safetensors")
    torch.save({"model": model.state_dict(), "model_ema": averaged, "epoch": 3}, tmp_path / "attnet_3_99.pth")
    command = ["attnet_xxs", "--checkpoint", str(tmp_path / "attnet_3_99.pth"), "--data", str(pictures)]
    size = ["--image-size", "32", "--workers", "0", "--json", str(tmp_path / "out.json")]
    validate([*command, *size, "--weights", "model_ema"])
    by_key = json.loads((tmp_path / "out.json").read_text())
    validate([str(whole / "checkpoints" / "latest" / "model"), "--data", str(pictures), *size])
    assert json.loads((tmp_path / "out.json").read_text())["loss"] == by_key["loss"]


def test_fine_tuning_begins_the_classifier_anew(whole, pictures, tmp_path):
    folder = whole / "checkpoints" / "latest" / "model"
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "head.fc.weight": torch.ones(7, 240), "head.fc.bias": torch.ones(7)}, tmp_path / "seven")
    session = session_of(pictures, tmp_path / "run", f"--model.init_from {tmp_path / 'seven'}")
    state = session.model.state_dict()
    assert torch.equal(state["stem.0.0.weight"], weights["stem.0.0.weight"])
    assert state["head.fc.weight"].shape == (CLASSES, 240) and state["head.fc.weight"].std() < 0.05


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("--model.name attnet_xss", "no network 'attnet_xss'.*attnet_xs"),
        ("--model.options {mixer:convv}", "convv"),
        ('--model.options {"colour":1}', "cannot be built.*colour"),
        ("--augmentation.mixupp 1", "Unknown key 'augmentation.mixupp'.*augmentation.mixup"),
        ("--augmentation.auto rand-m9-x --augmentation.color_jitter 0.4", "color_jitter would do nothing"),
        ("--augmentation.auto nonsense", "augmentation.auto 'nonsense' is not understood"),
        ("--augmentation.scale [0.9,0.1]", "a range from low to high"),
        ("--training.batch_size 19", "more than the 18 pictures"),
        ("--augmentation.mixup 1 --training.batch_size 5", "cannot be mixed in pairs"),
        ("--data.path nowhere", "does not exist"),
        ("--model.name pvt_tiny --data.image_size 16", "does not take pictures of 16×16"),
        ("--optimizer.momentum 0.5", "is SGD's"),
    ],
)
def test_a_mistake_is_a_paragraph_and_code_2(pictures, tmp_path, capsys, extra, said):
    fresh_accelerate()
    with pytest.raises(SystemExit) as ended:
        main([*words(pictures, extra), "--run", str(tmp_path / "run")])
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert ended.value.code == 2 and told.startswith("error: ")
    assert re.search(said, told)
    assert not (tmp_path / "run").exists()


def test_a_run_refuses_another_configuration_and_other_data(whole, pictures, tmp_path, capsys):
    with pytest.raises(InputError, match=r"another configuration \(training.accumulation: 1 -> 2"):
        run(pictures, whole, f"{EVERYTHING} --training.accumulation 2")
    with pytest.raises(InputError, match=r"where it ends"):
        run(pictures, whole, f"{EVERYTHING} --training.steps 8")
    other = tmp_path / "other"
    for label in range(CLASSES):
        (other / f"class{label}").mkdir(parents=True)
        for number in range(EACH):
            Image.new("RGB", (40, 36)).save(other / f"class{label}" / f"other{number}.png")
    with pytest.raises(InputError, match="other data"):
        run(other, whole, EVERYTHING)


def test_validation_refuses_other_weights_and_other_classes(whole, pictures, tmp_path, capsys):
    folder = whole / "checkpoints" / "latest" / "model"
    two = tmp_path / "two"
    for label in range(2):
        (two / f"class{label}").mkdir(parents=True)
        Image.new("RGB", (40, 36)).save(two / f"class{label}" / "0.png")

    weights = folder / "model.safetensors"
    for said, *arguments in (
        ("is for 3 classes, but there are 2", folder, "--data", two),
        ("is for 3 classes, but there are 2", "attnet_xxs", "--checkpoint", weights, "--data", two),
        ("are not for this AttNet", "attnet_xs", "--checkpoint", weights, "--data", pictures),
        ("by name it has no weights", "attnet_xxs", "--data", pictures),
        ("does not exist", "attnet_xxs", "--checkpoint", tmp_path / "none", "--data", pictures),
        ("one set of weights", "attnet_xxs", "--checkpoint", weights, "--weights", "model_ema", "--data", pictures),
        ("has its average", folder, "--weights", "model_ema", "--data", pictures),
        ("has no config.json", tmp_path, "--data", pictures),
        ("does not exist", folder, "--data", tmp_path / "missing"),
    ):
        with pytest.raises(SystemExit) as ended:
            validate([*map(str, arguments), "--workers", "0"])
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert ended.value.code == 2 and told.startswith("error: ") and said in told


def test_classes_of_training_and_validation_agree(pictures, tmp_path):
    (tmp_path / "val" / "class0").mkdir(parents=True)
    (tmp_path / "val" / "class1").mkdir()
    for label in range(2):
        Image.new("RGB", (40, 36)).save(tmp_path / "val" / f"class{label}" / "0.png")
    with pytest.raises(InputError, match=r"has 3 classes, .* has 2"):
        run(pictures, tmp_path / "run", f"--data.heldout {tmp_path / 'val'}")


def test_the_schedule_is_the_paper_s_cosine_with_warm_up(pictures, tmp_path):
    session = session_of(
        pictures,
        tmp_path / "run",
        "--training.steps 100 --optimizer.lr 1.0 --optimizer.warmup_steps 10 --optimizer.warmup_lr 0.1 "
        "--optimizer.min_lr 0",
    )
    found = [session.learning_rate(step) for step in (1, 6, 11, 51, 100)]
    cosine = [0.5 * (1 + np.cos(np.pi * t / 100)) for t in (10, 50, 99)]
    assert found == pytest.approx([0.1, 0.55, *cosine])


def test_keys_of_random_numbers_differ():
    drawn = set()
    for key in ((0, Stream.AUGMENTATION, 0), (0, Stream.AUGMENTATION, 1), (0, Stream.MIXING, 0), (1, Stream.MIXING, 0)):
        with keyed_globals(*key):
            drawn |= {random.random(), float(np.random.rand()), float(torch.rand(1))}
    assert len(drawn) == 12
