"""What a model knows of its classes, from training through resuming and fine-tuning to sampling."""

from pathlib import Path

import numpy as np
import pytest
import torch
from released_sources import Source, random_state
from training_runs import NO_PREVIEW, fresh_accelerate, run_tiny

import sample as sample_command
from sit_atconv import SiTPipeline
from sit_atconv.convert import load_released
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError
from sit_atconv.models import create_model
from sit_atconv.models.checkpoint import load_model

NAMES = ["ant", "bee", "cow", "dog"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Two pictures each of ant, bee and dog, but none of cow."""
    root = tmp_path_factory.mktemp("classes")
    pictures = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(root / "x.npz", arr_0=pictures, arr_1=[0, 1, 3, 3, 1, 0], class_names=NAMES)
    prepare([str(root / "x.npz"), str(root / "data"), "--resolution", "8", "--vae", "identity", "--workers", "0"])
    return str(root / "data")


def train(run: Path, data: str, words: str = "") -> Path:
    run_tiny(run, f"--data.path {data} --data.flip false --training.steps 1 --log.checkpoint_every 1 {words}")
    return run / "checkpoints" / "latest" / "model"


def sample(checkpoint: Path, out: Path, *words: str) -> Path:
    fresh_accelerate()
    common = ["--num-samples", "6", "--solver", "euler", "--steps", "1"]
    sample_command.main(["--checkpoint", str(checkpoint), "--out", str(out), *common, *words])
    return out / "samples.npz"


def test_only_learned_classes_are_drawn_and_samples_keep_the_names(data, tmp_path, capsys) -> None:
    checkpoint = train(tmp_path / "run", data, "--model.num_classes 6 --preview.every 1 --preview.classes 6")
    model = load_model(checkpoint)
    assert (model.config.class_names, list(model.config.empty_classes)) == (NAMES, [2, 4, 5])
    drawn = open_source(str(sample(checkpoint, tmp_path / "out")))
    assert sorted(drawn.labels.tolist()) == [0, 0, 1, 1, 3, 3] and drawn.class_names == NAMES
    chosen = open_source(str(sample(checkpoint, tmp_path / "dogs", "--labels", "dog,0")))
    assert chosen.labels.tolist() == [3, 0] * 3
    for label in ("cow", "5"):
        with pytest.raises(SystemExit):
            sample(checkpoint, tmp_path / "never", "--labels", label)
        assert "had no picture in training" in capsys.readouterr().err
    SiTPipeline(model).save_pretrained(tmp_path / "pipeline")
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "6 classes (ant, bee, cow, dog), 3 of them without a picture in training" in card


def test_a_null_class_that_was_never_trained_cannot_guide(data, tmp_path, capsys) -> None:
    words = "--flow.label_dropout 0"
    with pytest.raises(InputError, match=r"needs a null class.*label_dropout 0"):
        train(tmp_path / "guided", data, f"{words} --preview.guidance 4")
    checkpoint = train(tmp_path / "run", data, f"{words} {NO_PREVIEW}")
    assert load_model(checkpoint).config.label_dropout == 0
    with pytest.raises(SystemExit):
        sample(checkpoint, tmp_path / "out", "--guidance", "4")
    assert "Guidance 4.0 needs a null class" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    sample(checkpoint, tmp_path / "out")
    sample(checkpoint, tmp_path / "weak", "--guidance", "2", "--weak-checkpoint", str(checkpoint))
    pipe = SiTPipeline(load_model(checkpoint))
    assert len(pipe(["dog"], num_inference_steps=1).images) == 1  # without guidance by default
    with pytest.raises(InputError, match="needs a null class"):
        pipe(["dog"], 4.0)


def test_a_release_without_a_null_row_cannot_guide(tmp_path) -> None:
    state = random_state(Source(width=16, heads=2, mlp=64, variance=True))
    rows = len(state["y_embedder.embedding_table.weight"])
    assert load_released(state, 2).config.label_dropout == 0.1
    model = load_released(state, 2, num_classes=rows)
    assert model.config.label_dropout == 0
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config.label_dropout == 0


def test_fine_tuning_knows_what_its_model_has_learned_also_when_resumed(data, tmp_path) -> None:
    """The release knows cow but not dog; labels are no longer dropped."""
    shape = {"input_size": 8, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2}
    source = create_model("SiT-Hybrid-S/2", **shape, num_classes=2, class_names=["cow", "ant"])
    source.save_pretrained(tmp_path / "source")
    words = f"--model.init_from {tmp_path / 'source'} --flow.label_dropout 0 --model.num_classes 6 {NO_PREVIEW}"
    for steps in (1, 2):
        checkpoint = train(tmp_path / "run", data, f"{words} --training.steps {steps}")
        config = load_model(checkpoint).config
        assert (list(config.empty_classes), config.label_dropout) == ([4, 5], 0.1)


def test_generators_are_one_for_each_image(data) -> None:
    pipe = SiTPipeline(create_model("SiT-S/2", 8, 3, 3, hidden_size=16, depth=1, num_heads=2), None)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    options = {"guidance_scale": 1.0, "num_inference_steps": 1, "output_type": "latent"}
    drawn = pipe([0, 1, 2], generator=generators, **options).images
    for count in (1, 2):
        with pytest.raises(InputError, match=f"{count} generators were given for 3 images"):
            pipe([0, 1, 2], generator=generators[:count], **options)
    assert torch.equal(pipe([2], generator=torch.Generator().manual_seed(2), **options).images[0], drawn[2])
