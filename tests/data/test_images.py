from __future__ import annotations

import io
import itertools
import sys

import numpy as np
import pytest

from fedlearn.data.fit_images import fit_images
from fedlearn.data.folder import read_contents
from fedlearn.data.image_folders import ImageSettings
from fedlearn.data.images import read_images
from fedlearn.data.inputs import ImageInputs
from fedlearn.errors import DataError, MissingExtra, SettingError

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
RNG = np.random.default_rng(5)
GREY = RNG.integers(0, 256, (4, 6), dtype=np.uint8)
RGB = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65_536, (4, 6), dtype=np.uint16)


def saved(array, kind, **options):
    file = io.BytesIO()
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(file, kind, **options)
    return file


def write(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (array if isinstance(array, Image.Image) else Image.fromarray(array)).save(path, **options)
    return path


def inputs_of(*files, window=None, **settings):
    images = read_images([*files], [f"{n}.png" for n in range(len(files))], **settings).pixels
    return fit_images(images, window)[0].normalize(images)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA"])
def test_lossless_formats_of_8_bits_read_to_equal_values(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    arrays = [GREY] if kind == "GIF" else [GREY, RGB]
    for array in arrays:
        pixels = read_images([saved(array, kind, **options)], ["a"]).pixels[0]
        assert np.array_equal(pixels, array.reshape(*array.shape[:2], -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_keep_their_values(kind):
    pixels = read_images([saved(DEEP, kind)], ["a"]).pixels
    assert pixels.dtype == np.uint16
    assert np.array_equal(pixels[0, ..., 0], DEEP)


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32"])
def test_signed_and_float_tiff_keep_their_values_and_need_a_window(dtype):
    array = (RNG.normal(0, 700, (4, 6))).astype(dtype)
    read = read_images([saved(array, "TIFF")], ["a"]).pixels
    assert np.array_equal(read[0, ..., 0], array.astype(np.float32))
    with pytest.raises(SettingError, match=r"expected  \[centre,width\], because") as caught:
        fit_images(read, None)
    numbers = caught.value.fix.partition("[")[2].partition("]")[0].split(",")
    x = fit_images(read, [float(number) for number in numbers])[0].normalize(read)
    assert x.min() == pytest.approx(-1, abs=1e-3)
    assert x.max() == pytest.approx(1, abs=1e-3)


def test_one_picture_has_equal_inputs_in_8_bits_16_bits_and_floats():
    eight, sixteen = inputs_of(saved(GREY, "PNG")), inputs_of(saved(GREY.astype(np.uint16) * 257, "PNG"))
    floats = inputs_of(saved(GREY.astype(np.float32) / 255, "TIFF"))
    assert np.allclose(eight, sixteen, atol=1e-6)
    assert np.allclose(eight, floats, atol=1e-6)
    assert eight.min() >= -1
    assert eight.max() <= 1


def test_mixed_depths_have_the_values_of_the_larger_depth():
    images = read_images([saved(GREY, "PNG"), saved(DEEP, "PNG")], ["a", "b"])
    assert np.array_equal(images.pixels[0, ..., 0], GREY.astype(np.uint16) * 257)
    assert "1 images of 8 bits, 1 images of 16 bits" in images.notes


def test_a_window_clips_and_scales():
    array = np.array([[-1000, -160, 40, 240, 3000]], np.int32)
    x = inputs_of(saved(array, "TIFF"), window=[40, 400])
    assert x.ravel().tolist() == [-1, -1, 0, 1, 1]


@pytest.mark.parametrize("window", [[40], [40, 0], [40, -1], "40,400", [40, float("nan")], 7])
def test_a_wrong_window_is_refused(window):
    with pytest.raises(SettingError, match="window"):
        fit_images(np.zeros((1, 2, 2, 1), np.uint8), window)


def test_12_bits_in_files_of_16_bits_give_a_hint():
    _, line = fit_images((DEEP // 16)[None, ..., None], None)
    assert "scenario.window=[2048,4096]" in line


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_exif_is_applied(orientation):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(RGB, "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(file)))
    assert np.array_equal(read_images([file], ["a"]).pixels[0], expected)


@pytest.mark.parametrize(
    ("mode", "kind", "channels"),
    [("1", "PNG", 1), ("P", "PNG", 3), ("LA", "PNG", 1), ("RGBA", "PNG", 3), ("CMYK", "TIFF", 3), ("YCbCr", "TIFF", 3)],
)
def test_colour_spaces_become_grey_or_rgb(mode, kind, channels):
    image = Image.fromarray(RGB).convert(mode)
    read = read_images([saved(image, kind)], ["a"])
    assert read.pixels.shape == (1, 4, 6, channels)
    assert np.array_equal(read.pixels[0].squeeze(), np.asarray(image.convert("L" if channels == 1 else "RGB")))
    assert read.notes


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparent_pixels_become_white_and_never_show_hidden_colours(mode):
    image = Image.new(mode, (3, 2), (7, 0) if mode == "LA" else (7, 8, 9, 0))
    read = read_images([saved(image, "PNG")], ["a"])
    assert (read.pixels == 255).all()
    assert "transparent pixels to white (1)" in read.notes


def test_one_colour_image_makes_all_images_colour():
    for files in itertools.permutations([saved(GREY, "PNG"), saved(RGB, "PNG")]):
        read = read_images(files, ["a", "b"])
        assert read.pixels.shape[-1] == 3
        assert read.notes == ("1 grey and 1 colour images, all to RGB",)
    assert read_images([saved(RGB, "PNG")], ["a"], channels=1).pixels.shape[-1] == 1


def cut(content):
    return content[: len(content) // 2]


def test_all_images_that_cannot_be_used_are_named_at_once(tmp_path):
    write(tmp_path / "cat" / "good.png", RGB)
    good = (tmp_path / "cat" / "good.png").read_bytes()
    big = io.BytesIO()
    Image.fromarray(RNG.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(big, "JPEG")
    (tmp_path / "cat" / "cut.png").write_bytes(cut(good))
    (tmp_path / "cat" / "cut.jpg").write_bytes(cut(big.getvalue()))
    (tmp_path / "cat" / "empty.PNG").touch()
    (tmp_path / "cat" / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    frames = [Image.new("L", (6, 4), value) for value in (1, 2)]
    frames[0].save(tmp_path / "cat" / "film.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "cat" / "pages.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError) as caught:
        read_contents(tmp_path, images=ImageSettings(size=4))
    text = str(caught.value)
    assert text.startswith("7 of 8 images cannot be read")
    for name, reason in [
        ("cut.png", "cut short"),
        ("cut.jpg", "cut short"),
        ("empty.PNG", "an empty file"),
        ("page.jpg", "not an image"),
        ("gone.png", "a link to a file that does not exist"),
        ("film.gif", "2 frames"),
        ("pages.tif", "2 frames"),
    ]:
        assert f"cat/{name} ({reason}" in text.replace("damaged or ", "").replace("\\", "/")
    assert "try       scenario.skip_damaged=true" in text
    left = read_contents(tmp_path, images=ImageSettings(size=4, skip_damaged=True))
    assert len(left.images) == len(left.table) == 1
    assert "7 of 8 images cannot be read and are left out" in left.notes


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_damaged_bytes_never_raise_another_error(kind):
    content = saved(RNG.integers(0, 255, (24, 24, 3), dtype=np.uint8), kind).getvalue()
    messages = set()
    for _ in range(60):
        damaged = bytearray(content[: RNG.integers(1, len(content) + 1)])
        for place in RNG.integers(0, min(len(damaged), 100), RNG.integers(0, 6)):
            damaged[place] = RNG.integers(256)
        try:
            read_images([io.BytesIO(bytes(damaged))], ["a"], size=8)
        except DataError as error:
            messages.add(str(error).partition(":")[0])
    assert messages == {"a cannot be read as an image"}


def test_a_huge_image_is_refused_before_its_pixels_are_read(monkeypatch):
    monkeypatch.setattr("fedlearn.data.images.MAX_PIXELS", 20)
    with pytest.raises(DataError, match=r"6 x 4 pixels, more than 20"):
        read_images([saved(RGB, "PNG")], ["a"], size=2)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.HEIC", "a.svg", "a.npy"])
def test_formats_that_are_not_read_are_refused_by_name(tmp_path, name):
    write(tmp_path / "cat" / "1.png", GREY)
    (tmp_path / "cat" / name).touch()
    with pytest.raises(DataError, match=rf"fedlearn does not read \.{name.split('.', 1)[1].lower()} files: cat.{name}"):
        read_contents(tmp_path)
    assert len(read_contents(tmp_path, images=ImageSettings(skip_damaged=True)).images) == 1


def test_classes_that_differ_in_case_are_refused_unless_they_are_named(tmp_path):
    for name in ("north/Cat", "south/cat", "south/dog"):
        write(tmp_path / name / "1.png", GREY)
    if not (tmp_path / "south" / "cat").is_dir():
        pytest.skip("the file system ignores case")
    with pytest.raises(DataError, match=r"Cat and cat differ in upper case only") as caught:
        read_contents(tmp_path)
    named = str(caught.value).partition("scenario.classes=[")[2].partition("]")[0].split(",")
    assert set(read_contents(tmp_path, images=ImageSettings(classes=tuple(named))).table.columns["class"]) == set(named)


def test_a_table_may_name_the_classes_of_images(tmp_path):
    for number in range(4):
        write(tmp_path / ("train" if number < 3 else "test") / f"{number}.PNG", np.full((2, 2), number, np.uint8))
    (tmp_path / "labels.csv").write_text("file,site,ill\n2.png,north,yes\n0,south,no\ntest/3.PNG,north,no\n")
    contents = read_contents(tmp_path, client_column="site")
    assert contents.images[:, 0, 0, 0].tolist() == [2, 0, 3]
    assert contents.clients.tolist() == ["north", "south", "north"]
    assert contents.test_N.tolist() == [False, False, True]
    assert list(contents.table.columns) == ["site", "ill"]
    assert "1 images without a row in the table are left out" in contents.notes
    (tmp_path / "labels.csv").write_text("file,ill\n2.png,yes\n7.png,no\n")
    with pytest.raises(DataError, match=r"labels\.csv, row 3, column file: not the name of one image"):
        read_contents(tmp_path)


def test_image_inputs_survive_their_description():
    from fedlearn.data.preprocessing import Preprocessing, Target

    inputs = ImageInputs(height=2, width=3, channels=1, offset=40.0, scale=200.0, depth=0, clip=True)
    description = Preprocessing(inputs=inputs, target=Target(task="binary", classes=("no", "yes")))
    assert Preprocessing.from_json(description.to_json()) == description


def dicom_file(path, pixels, *, interpretation="MONOCHROME2", slope=1.0, intercept=-1024.0, frames=1):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, interpretation
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.NumberOfFrames = slope, intercept, frames
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset)


def test_dicom_has_values_in_its_unit(tmp_path):
    stored = RNG.integers(0, 4096, (4, 6))
    dicom_file(tmp_path / "cat" / "1.dcm", stored)
    assert np.array_equal(read_contents(tmp_path).images[0, ..., 0], stored - 1024.0)
    dicom_file(tmp_path / "cat" / "1.dcm", stored, interpretation="MONOCHROME1")
    assert np.array_equal(read_contents(tmp_path).images[0, ..., 0], 4095 - stored - 1024.0)
    dicom_file(tmp_path / "cat" / "1.dcm", np.stack([stored, stored]), frames=2)
    with pytest.raises(DataError, match=r"1\.dcm cannot be read as an image: 2 frames"):
        read_contents(tmp_path)


def test_dicom_names_the_extra_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.dcm").touch()
    with pytest.raises(MissingExtra, match=r"fedlearn\[dicom\]"):
        read_contents(tmp_path)
