"""Generation: what a sample depends on, labels, the sample directory, and sample.py as a user runs it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import sample
from sit_atconv import SiT, create_model
from sit_atconv.autoencoder import LatentSpec, load_autoencoder
from sit_atconv.errors import InputError
from sit_atconv.sampling import SamplerSettings, generate, sample_to_directory
from sit_atconv.sampling.grid import pick_for_grid, save_grid
from sit_atconv.sampling.labels import choose_labels

PIXELS = LatentSpec("identity", None, 1, 1, 1.0, 0.0)


def tiny_model(num_classes: int = 3, **options: object) -> SiT:
    torch.manual_seed(1)
    model = create_model(
        "SiT-Hybrid-S/2",
        input_size=(8, 6),
        in_channels=1,
        num_classes=num_classes,
        hidden_size=16,
        depth=2,
        num_heads=2,
        latents=PIXELS.to_dict(),
        **options,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tiny_model(class_names=["zero", "one", "two"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def images_of(model: SiT, indices: list[int], settings: SamplerSettings, **options: object) -> np.ndarray:
    batches = generate(model, load_autoencoder(PIXELS), indices, settings, **options)
    return torch.cat([batch.images for batch in batches]).numpy().astype(int)


SETTINGS = [
    SamplerSettings("euler", 4),
    SamplerSettings("heun", 4, guidance=2.0, interval=(0.2, 0.8)),
    SamplerSettings("midpoint", 4, guidance=1.5, guidance_channels=1, shift=2.0),
    SamplerSettings("sde", 6, guidance=1.5),
    SamplerSettings("sde", 6, diffusion="linear", last_step="tweedie"),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.solver}-{s.guidance}")
def test_a_sample_depends_on_seed_and_index_alone(settings: SamplerSettings) -> None:
    model = tiny_model()
    whole = images_of(model, list(range(7)), settings, batch_size=7, seed=5)
    assert whole.shape == (7, 3, 8, 6)
    for size in (1, 3):
        assert np.abs(images_of(model, list(range(7)), settings, batch_size=size, seed=5) - whole).max() <= 1
    assert np.abs(images_of(model, [6, 2], settings, seed=5) - whole[[6, 2]]).max() <= 1
    assert np.abs(images_of(model, list(range(7)), settings, seed=6) - whole).max() > 1


def test_guidance_one_equals_the_conditional_model() -> None:
    model = tiny_model()
    plain = images_of(model, [0, 1, 2], SamplerSettings("heun", 4))
    guided = images_of(model, [0, 1, 2], SamplerSettings("heun", 4, guidance=3.0))
    assert np.abs(plain - guided).max() > 1


def test_balanced_labels_are_balanced_unsorted_and_independent_of_the_rest() -> None:
    labels = choose_labels("balanced", range(50), 10, seed=0)
    assert labels.bincount().tolist() == [5] * 10
    for start in range(0, 50, 10):
        assert sorted(labels[start : start + 10].tolist()) == list(range(10))
    assert not torch.equal(labels, labels.sort().values)
    assert choose_labels("balanced", [31, 7], 10, seed=0).tolist() == labels[[31, 7]].tolist()


def test_random_and_listed_labels() -> None:
    labels = choose_labels("random", range(3000), 3, seed=0)
    assert labels.bincount().min() > 900
    assert choose_labels("random", [17], 3, seed=0).item() == labels[17]
    assert choose_labels("2,0", range(5), 3, seed=0).tolist() == [2, 0, 2, 0, 2]
    assert choose_labels("cat, 1", range(2), 3, 0, ["dog", "mouse", "cat"]).tolist() == [2, 1]
    assert choose_labels("balanced", range(5), 0, seed=0) is None


@pytest.mark.parametrize(("rule", "classes"), [("3", 3), ("1,x", 3), ("-1", 3), ("", 3), ("1", 0)])
def test_unknown_labels_are_named(rule: str, classes: int) -> None:
    with pytest.raises(InputError, match=r"Unknown label|unconditional"):
        choose_labels(rule, range(2), classes, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "Unknown solver 'rk4'"),
        ({"precision": "fp8"}, "Unknown precision"),
        ({"interval": (0.0, 0.7)}, "interval without guidance"),
    ],
)
def test_impossible_settings_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SamplerSettings(**options)


def test_guidance_of_an_unconditional_model_is_refused() -> None:
    with pytest.raises(InputError, match="unconditional"):
        images_of(tiny_model(num_classes=0), [0], SamplerSettings(guidance=2.0))


def test_broken_weights_are_noticed() -> None:
    model = tiny_model()
    nn.init.constant_(model.final.proj.bias, float("nan"))
    with pytest.raises(InputError, match="samples 4 to 5"):
        images_of(model, [4, 5], SamplerSettings("euler", 2))


def draw(checkpoint: Path, out: Path, **options: object) -> None:
    settings = options.pop("settings", SamplerSettings("euler", 3))
    sample_to_directory(checkpoint, out, options.pop("num_samples", 9), settings, **options)


def test_the_directory_holds_adms_npz_a_grid_and_pngs(checkpoint: Path, tmp_path: Path) -> None:
    draw(checkpoint, tmp_path / "out", png=True)
    with np.load(tmp_path / "out" / "samples.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (9, 8, 6, 3)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [3, 3, 3]
    for i in range(9):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "png" / f"{i:06d}.png")), images[i])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"samples.npz", "grid.png", "settings.json", "png"}
    expected = images_of(tiny_model(), list(range(9)), SamplerSettings("euler", 3)).transpose(0, 2, 3, 1)
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_an_interrupted_directory_continues(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    draw(checkpoint, tmp_path / "whole")
    drawn = []

    def interrupted(model, autoencoder, indices, *args, **kwargs):
        for batch in generate(model, autoencoder, indices, *args, **kwargs):
            if len(drawn) == 4:
                raise KeyboardInterrupt
            drawn.extend(batch.indices)
            yield batch

    monkeypatch.setattr("sit_atconv.sampling.run.generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(checkpoint, tmp_path / "out", batch_size=2)
    assert not (tmp_path / "out" / "samples.npz").exists()
    drawn.append(-1)  # from now on nothing interrupts
    draw(checkpoint, tmp_path / "out", batch_size=2)
    assert sorted(drawn) == [-1, *range(9)]  # nothing was drawn twice
    a, b = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("out", "whole"))
    assert np.abs(a - b).max() <= 1
    before = (tmp_path / "out" / "samples.npz").stat().st_mtime_ns
    draw(checkpoint, tmp_path / "out", batch_size=2)  # complete: nothing is done
    assert (tmp_path / "out" / "samples.npz").stat().st_mtime_ns == before


def test_other_settings_and_foreign_directories_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    draw(checkpoint, tmp_path / "out")
    with pytest.raises(InputError, match="seed: 0 -> 1"):
        draw(checkpoint, tmp_path / "out", seed=1)
    with pytest.raises(InputError, match="num_samples: 9 -> 10"):
        draw(checkpoint, tmp_path / "out", num_samples=10)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        draw(checkpoint, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_latents_of_another_autoencoder_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.register_to_config(latents=None)
    model.save_pretrained(tmp_path / "anonymous")
    with pytest.raises(InputError, match="--vae"):
        draw(tmp_path / "anonymous", tmp_path / "out")
    model.register_to_config(latents={**PIXELS.to_dict(), "scale": 0.5})
    model.save_pretrained(tmp_path / "scaled")
    with pytest.raises(InputError, match=r"scale: 0\.5 against 1\.0"):
        draw(tmp_path / "scaled", tmp_path / "out", vae="identity")
    assert not (tmp_path / "out").exists()


def test_grids_hold_a_class_a_row(tmp_path: Path) -> None:
    labels = torch.tensor([2, 0, 1, 0, 2, 1, 1, 0])
    assert pick_for_grid(labels, 8) == [1, 3, 2, 5, 0, 4]
    assert pick_for_grid(None, 3) == [0, 1, 2]
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 8, 8) * 60
    save_grid(images, 2, tmp_path / "grid.png")
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 * 48 + 6, 2 * 48 + 6, 3)
    assert [sheet[20, 20, 0], sheet[20, 80, 0], sheet[80, 20, 0], sheet[80, 80, 0]] == [0, 60, 120, 180]


def test_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--out", tmp_path / "out", "--num-samples", 6, "--solver", "sde", "--steps", 3, "--guidance", 1.8]
    words += ["--checkpoint", checkpoint, "--interval", 0, 0.7, "--labels", "two,0"]
    sample.main(list(map(str, words)))
    assert np.load(tmp_path / "out" / "samples.npz")["arr_1"].tolist() == [2, 0, 2, 0, 2, 0]
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["interval"] == [0.0, 0.7]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["--labels", "7"], "Unknown label '7'"),
        (["--solver", "rk4"], "invalid choice: 'rk4'"),
        (["--stepz", "4"], "unrecognized arguments: --stepz"),
    ],
)
def test_mistakes_end_with_code_2_and_one_paragraph(checkpoint: Path, tmp_path: Path, words, message, capsys) -> None:
    always = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--num-samples", "2", "--steps", "2"]
    with pytest.raises(SystemExit) as exit_:
        sample.main(always + words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
