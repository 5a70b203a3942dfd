"""What sampling stands on: its directory, its launcher, data that are what was written."""

from pathlib import Path

import pytest
from sampling_fixtures import tiny_model

import sample
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.sampling import generate, inversion, likelihood


def command(out: Path, *words: str) -> list[str]:
    given = ["--checkpoint", str(out.parent / "model"), "--out", str(out), "--num-samples", "6", "--solver", "euler"]
    return [*given, "--steps", "1", "--batch-size", "2", *words]


@pytest.mark.parametrize("words", [(), ("--png",)])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_directory_that_was_moved_is_not_made_anew(
    tmp_path: Path, monkeypatch, capsys, words: tuple[str, ...], replaced: bool
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    out = tmp_path / "out"

    def moving(*args: object, **kwargs: object) -> object:
        for number, batch in enumerate(generate(*args, **kwargs)):
            if number == 1:
                out.rename(tmp_path / "moved")
                if replaced:
                    out.mkdir()
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr("sit_atconv.sampling.run.generate", moving)
        with pytest.raises(SystemExit) as end:
            sample.main(command(out, *words))
    error = capsys.readouterr().err
    assert end.value.code == 1 and "out is gone: it was moved or removed while sampling went on" in error
    assert list(out.iterdir()) == [] if replaced else not out.exists()
    sample.main(command(tmp_path / "moved", *words))
    assert (tmp_path / "moved" / "samples.npz").exists()


@pytest.mark.parametrize(
    ("variable", "value", "words", "message"),
    [
        ("MIXED_PRECISION", "bf16", [], "precision decides, which is no here"),
        ("MIXED_PRECISION", "bf16", ["--precision", "bf16"], None),
        ("MIXED_PRECISION", "no", ["--precision", "bf16"], None),
        ("DYNAMO_BACKEND", "INDUCTOR", [], "compile decides"),
    ],
)
def test_what_launcher_and_options_say_differently(
    tmp_path: Path, monkeypatch, capsys, variable: str, value: str, words: list[str], message: str | None
) -> None:
    monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    tiny_model().save_pretrained(tmp_path / "model")
    if message is None:
        sample.main(command(tmp_path / "out", *words))
        return
    with pytest.raises(SystemExit) as end:
        sample.main(command(tmp_path / "out", *words))
    assert end.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_preparation_says_that_the_launchers_precision_is_not_its_own(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    prepare(["digits@8", str(tmp_path / "data"), "--resolution", "8", "--vae", "identity", "--workers", "0"])
    assert "--mixed_precision bf16 is for training: pictures are encoded in fp32" in caplog.text


@pytest.mark.parametrize("program", [likelihood, inversion])
def test_a_flipped_bit_in_a_shard_that_is_read_is_found(tmp_path: Path, capsys, program) -> None:
    words = ["--resolution", "8x6", "--vae", "identity", "--channels", "1", "--workers", "0", "--shard-size", "500"]
    prepare(["digits@8", str(tmp_path / "data"), *words])
    tiny_model(num_classes=10).save_pretrained(tmp_path / "model")
    first, second = sorted((tmp_path / "data").glob("*.safetensors"))[:2]
    asked = ["--checkpoint", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--steps", "1"]
    asked += ["--num-images", "3", *(["--out", str(tmp_path / "out")] if program is inversion else [])]
    flip(second)
    program.main(asked)  # nothing of that one is read
    flip(first)
    with pytest.raises(SystemExit) as end:
        program.main(asked)
    assert end.value.code == 2 and "shard-00000.safetensors: the checksum differs" in capsys.readouterr().err


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
