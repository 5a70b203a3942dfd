"""Tables of the Hugging Face hub and parquet files: the right columns are read, and no others."""

import io
import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image
from test_data_sources import picture, png

from sit_atconv.data.pictures.protocol import SourceOptions
from sit_atconv.data.prepare.__main__ import main as prepare
from sit_atconv.data.sources import open_source
from sit_atconv.errors import InputError

datasets = pytest.importorskip("datasets")
arrow = pytest.importorskip("pyarrow")

from pyarrow import parquet  # noqa: E402

PICTURES = [{"bytes": png(picture(seed)), "path": None} for seed in range(3)]
ROWS = range(3)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def write_repository(folder, kinds: dict, **columns: list):
    """A copy of a hub repository with one parquet file, whose metadata name the kinds of columns."""
    (folder / "data").mkdir(parents=True)
    kinds = {"image": datasets.Image(), **kinds}
    table = arrow.table({"image": PICTURES, **columns}, schema=datasets.Features(kinds).arrow_schema)
    parquet.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    return f"hf:{folder}"


def text_kind():
    return datasets.Value("string")


@pytest.mark.parametrize("column", ["label", "labels", "cls", "class"])
def test_words_become_sorted_names(tmp_path, column):
    name = write_repository(tmp_path / "x", {column: text_kind()}, **{column: ["cat", "ant", "cat"]})
    source = pickle.loads(pickle.dumps(open_source(name)))
    assert source.labels.tolist() == [1, 0, 1] and source.class_names == ["ant", "cat"] and not source.lossy
    for index in ROWS:
        np.testing.assert_array_equal(source[index].image, picture(index))


def test_words_by_the_command(tmp_path):
    name = write_repository(tmp_path / "x", {"kind": text_kind()}, kind=["cat", "ant", "cat"])
    prepare([name, str(tmp_path / "out"), "--resolution", "8", "--vae", "identity", "--label-column", "kind"])
    manifest = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (manifest["count"], manifest["class_names"]) == (3, ["ant", "cat"])


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (lambda: datasets.ClassLabel(names=["x", "y"]), [None, 1, 0], "label in row 0 is missing"),
        (lambda: datasets.ClassLabel(names=["x", "y"]), [1, -1, 0], "label in row 1 is -1"),
        (lambda: datasets.Value("int64"), [1, None, 0], "label in row 1 is missing"),
        (lambda: datasets.Value("float32"), [0.5, 1.5, -0.5], r"label in row 0 is 0\.5"),
        (lambda: datasets.Value("bool"), [True, False, True], "label in row 0 is True"),
        (text_kind, ["cat", None, "cat"], "label in row 1 is missing"),
        (lambda: datasets.Sequence(datasets.Value("int64")), [[1, 2], [0], []], r"label in row 0 is \[1, 2\]"),
    ],
)
def test_labels_that_are_refused(tmp_path, kind, values, message):
    name = write_repository(tmp_path / "x", {"label": kind()}, label=values)
    with pytest.raises(InputError, match=message + ".*--unconditional"):
        open_source(name)
    assert open_source(name, options=SourceOptions(unconditional=True)).labels is None


def test_a_table_without_labels_is_said_to_have_none(tmp_path, caplog):
    caplog.set_level("INFO")
    assert open_source(write_repository(tmp_path / "x", {"score": text_kind()}, score=["a", "b", "c"])).labels is None
    assert "has no column of labels among image, score; --label-column names one" in caplog.text


def test_which_of_several_columns(tmp_path):
    kinds = {"fine": datasets.ClassLabel(names=["a", "b"]), "coarse": datasets.ClassLabel(names=["c"])}
    name = write_repository(tmp_path / "classes", kinds, fine=[0, 1, 1], coarse=[0, 0, 0])
    with pytest.raises(InputError, match=r"several columns of classes \(fine, coarse\): choose one by --label-column"):
        open_source(name)
    assert open_source(name, options=SourceOptions(label_key="coarse")).class_names == ["c"]
    with pytest.raises(InputError, match="no column 'other'; it has image, fine, coarse"):
        open_source(name, options=SourceOptions(label_key="other"))
    name = write_repository(tmp_path / "pictures", {"mask": datasets.Image()}, mask=PICTURES[::-1])
    with pytest.raises(InputError, match=r"several columns of pictures \(image, mask\): choose one by --image-column"):
        open_source(name)
    source = open_source(name, options=SourceOptions(image_key="mask"))
    np.testing.assert_array_equal(source[0].image, picture(2))
    with pytest.raises(InputError, match="no column 'other' of pictures; it has image, mask"):
        open_source(name, options=SourceOptions(image_key="other"))


def test_other_columns_are_not_decoded(tmp_path):
    broken = [{"bytes": b"no picture", "path": None}] * 3
    kinds = {"mask": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y"])}
    name = write_repository(tmp_path / "x", kinds, mask=broken, label=[0, 1, 0])
    source = open_source(name, options=SourceOptions(image_key="image"))
    assert source.labels.tolist() == [0, 1, 0] and source._table.column_names == ["image"]
    np.testing.assert_array_equal(source[2].image, picture(2))


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_a_parquet_file_without_metadata(tmp_path, form):
    cells = PICTURES if form == "struct" else [cell["bytes"] for cell in PICTURES]
    parquet.write_table(arrow.table({"img": cells, "label": [1, 0, 1]}), tmp_path / "x.parquet")
    for name in (f"{tmp_path}/x.parquet", f"hf:{tmp_path}/x.parquet"):
        source = pickle.loads(pickle.dumps(open_source(name)))
        assert source.labels.tolist() == [1, 0, 1] and source.class_names is None
        for index in ROWS:
            np.testing.assert_array_equal(source[index].image, picture(index))
    prepare([f"{tmp_path}/x.parquet", str(tmp_path / "out"), "--resolution", "8", "--vae", "identity"])
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["num_classes"] == 2


def test_bytes_that_are_no_pictures(tmp_path):
    cells = [PICTURES[0]["bytes"], b"junk", None]
    parquet.write_table(arrow.table({"img": cells, "thumb": cells}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"several columns of pictures \(img, thumb\)"):
        open_source(tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet", options=SourceOptions(image_key="img"))
    with pytest.raises(InputError, match=r"Cannot decode hf:.*x\.parquet\[1\]"):
        source[1]
    with pytest.raises(InputError, match=r"x\.parquet\[2\] holds no picture"):
        source[2]
    parquet.write_table(arrow.table({"img": [{"bytes": None, "path": "no.png"}]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"Cannot read no\.png, hf:.*No such file"):
        open_source(tmp_path / "x.parquet")[0]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_of_pictures_with_metadata(tmp_path, kind):
    root = tmp_path / "x"
    root.mkdir()
    for index in ROWS:
        Image.fromarray(picture(index)).save(root / f"{index}.png")
    words = ["cat", "ant", "cat"]
    if kind == "csv":
        (root / "metadata.csv").write_text("file_name,label\n" + "".join(f"{k}.png,{w}\n" for k, w in enumerate(words)))
    else:
        rows = [json.dumps({"file_name": f"{k}.png", "label": w}) for k, w in enumerate(words)]
        (root / "metadata.jsonl").write_text("\n".join(rows))
    for name in (f"hf:{root}", str(root)):
        source = open_source(name)
        assert source.labels.tolist() == [1, 0, 1] and source.class_names == ["ant", "cat"]
        for index in ROWS:
            np.testing.assert_array_equal(source[index].image, picture(index))


def _labelled_pictures():
    for seed, label in enumerate((1, 0, 1)):
        yield {"image": Image.fromarray(picture(seed)), "label": label}


def test_what_save_to_disk_writes(tmp_path):
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    table = datasets.Dataset.from_generator(
        _labelled_pictures, features=datasets.Features(columns), cache_dir=str(tmp_path / "cache")
    )
    table.save_to_disk(tmp_path / "table")
    datasets.DatasetDict({"train": table, "test": table.select([2])}).save_to_disk(tmp_path / "splits")
    (tmp_path / "repository").mkdir()
    table.to_parquet(tmp_path / "repository" / "train.parquet")
    for name in ("table", "splits", "splits:train", "repository"):
        source = pickle.loads(pickle.dumps(open_source(f"hf:{tmp_path}/{name}")))
        assert (source.class_names, source.labels.tolist(), source.lossy) == (["cat", "dog"], [1, 0, 1], False)
        for index in ROWS:
            np.testing.assert_array_equal(source[index].image, picture(index))
    assert len(open_source(f"hf:{tmp_path}/splits:test")) == 1
    with pytest.raises(InputError, match=r"Unknown split of hf:.*splits 'val': allowed: train, test"):
        open_source(f"hf:{tmp_path}/splits:val")


def test_the_split_of_a_hub_id_is_asked_for(tmp_path, monkeypatch):
    asked, lossy = [], io.BytesIO()
    Image.fromarray(picture(1)).save(lossy, "JPEG")
    table = datasets.Dataset.from_dict({"image": [{"bytes": lossy.getvalue(), "path": None}]})
    table = table.cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: asked.append((path, split)) or table)
    source = open_source("hf:owner/name:validation")
    assert asked == [("owner/name", "validation")] and len(source) == 1 and source.lossy
    table = table.select([])
    with pytest.raises(InputError, match="its table is empty"):
        open_source("hf:owner/name")


def test_tables_that_cannot_be_read(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 junk")
    with pytest.raises(InputError, match=r"Cannot load hf:.*x\.parquet: "):
        open_source(tmp_path / "x.parquet")
    parquet.write_table(arrow.table({"text": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no column of pictures; its columns are text"):
        open_source(tmp_path / "x.parquet")
    (tmp_path / "several").mkdir()
    parquet.write_table(arrow.table({"text": ["a"]}), tmp_path / "several" / "1.parquet")
    parquet.write_table(arrow.table({"other": [1]}), tmp_path / "several" / "2.parquet")
    with pytest.raises(InputError, match=r"No pictures in .*several, but parquet files: give hf:.*several"):
        open_source(tmp_path / "several")
    with pytest.raises(InputError, match=r"Cannot load hf:.*several: "):
        open_source(f"hf:{tmp_path}/several")
    with pytest.raises(InputError, match=r"Cannot load hf:.*x\.parquet:test: .*split"):
        open_source(f"hf:{tmp_path}/x.parquet:test")


def test_the_package_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install"):
        open_source("hf:someone/something")
