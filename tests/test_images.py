"""Images: pixels and positions equal transformers'; unusual files are handled, or refused by name."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from medrlvr_jax.data import images, patches
from medrlvr_jax.data.patches import Grid
from medrlvr_jax.data.question import DataError
from medrlvr_jax.model.architecture import VisionConfig
from medrlvr_jax.model.vision import normalize

CFG = VisionConfig("qwen2_5_vl", 4, 64, 4, 100, 48, 290, 292, 293, max_pixels=28 * 28 * 100)
REAL = Path(__file__).parents[2] / "shared" / "data" / "vision"
theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": CFG.min_pixels, "longest_edge": CFG.max_pixels})


def noise(height, width, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.RandomState(height).randint(0, 256, shape).astype(np.uint8))


def saved(image, kind="PNG", **more):
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def pixels_equal(image):
    """Compare our patches, with each frame twice, with the processor's."""
    cut, grid = patches.cut_patches(images.read_image(saved(image)), CFG)
    want = theirs(images=[image], return_tensors="np")
    assert want["image_grid_thw"].tolist() == [[1, grid.rows * 2, grid.columns * 2]]
    ours = normalize(cut.reshape(-1, 588), CFG, np)
    ours = np.repeat(ours.reshape(-1, 3, 1, 196), CFG.frames, 2).reshape(len(ours), -1)
    np.testing.assert_array_equal(ours, want["pixel_values"])


@pytest.mark.parametrize(
    "size", [(100, 260), (333, 190), (64, 64), (29, 400), (1, 150), (5, 5), (700, 900), (42, 98)]
)
def test_pixels_equal_transformers(size):
    pixels_equal(noise(*size))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_grey_and_transparent_images_equal_transformers(channels):
    pixels_equal(noise(80, 120, channels))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
def test_real_images_equal_transformers():
    rows = [json.loads(line) for line in (REAL / "questions.jsonl").read_text().splitlines()]
    for name in sorted({row["image"] for row in rows})[::9]:  # all 324 are equal, in 20 s
        pixels_equal(images.read_image(str(REAL / name)))


def test_exif_orientation():
    image, exif = noise(60, 90), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    turned = images.read_image(saved(image, exif=exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def test_sixteen_bit_grey_keeps_its_range():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    grey = np.asarray(images.read_image(saved(Image.fromarray(values))))
    assert grey[..., 0].tolist() == [[0, 1, 128, 255]]


def test_palette_and_cmyk():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    for data in (saved(red.convert("P")), saved(red.convert("CMYK"), "TIFF")):
        assert np.asarray(images.read_image(data))[0, 0].tolist() == [255, 0, 0]


def bomb():
    """Return a PNG of 10 KB that decodes to 30,000 × 30,000 pixels."""
    data = bytearray(saved(Image.new("1", (8, 8))))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    header = bytes(data[12:29])
    data[29:33] = PngImagePlugin._crc32(header).to_bytes(4, "big")
    return bytes(data)


REFUSED = {
    "it has 3 frames": saved(noise(8, 8), "GIF", save_all=True, append_images=[noise(9, 8), noise(7, 8)]),
    "truncated": saved(noise(200, 200), "JPEG")[:5000],
    "bomb": bomb(),
    "cannot identify": b"no image at all",
    "32 bits": saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"),
    "over 200 times": saved(noise(1, 201)),
}


@pytest.mark.parametrize("problem", REFUSED)
def test_refused_by_name(problem, tmp_path):
    file = tmp_path / "scan.png"
    file.write_bytes(REFUSED[problem])
    with pytest.raises(DataError, match=problem) as refused:
        patches.grid_of(str(file), CFG)
    assert str(refused.value).startswith(f"{file}: ")
    with pytest.raises(DataError, match="no such image"):
        patches.grid_of(str(tmp_path / "gone.png"), CFG)


def test_windows_of_a_small_image():
    """5 × 6 image tokens are four windows of 4 × 4: 16, 8, 4 and 2 tokens."""
    held = patches.window_layout(Grid(5, 6), 4)
    assert (held >= 0).sum(1).tolist() == [16, 8, 4, 2]
    assert held[0, :6].tolist() == [0, 1, 2, 3, 6, 7] and held[3].tolist() == [28, 29] + [-1] * 14
    slots = patches.token_slots((Grid(5, 6), Grid(1, 1)), CFG)
    assert slots[[0, 4, 6, 24, 28, 29, 30]].tolist() == [0, 16, 4, 32, 48, 49, 64]


def test_arrange_windows_places_each_patch():
    first, second = noise(140, 168), noise(28, 56)
    cut = lambda *row: [patches.cut_patches(image, CFG) for image in row]
    out = patches.arrange_windows([cut(first, second), cut(second)], 6, CFG)
    assert out.pixels.shape == (2, 6, 64, 588)
    slots = out.slots[0].reshape(-1, 5)
    assert (slots[:, 0] == 0).sum() == 120 and (slots[:, 0] == 1).sum() == 24  # enlarged to 56 × 84
    pixels = np.asarray(first.resize((168, 140)))  # of the target's size already
    flat = out.pixels[0].reshape(-1, 588)
    for i in np.flatnonzero(slots[:, 0] == 0)[::7]:
        row, column = slots[i, 1:3] * 14
        patch = pixels[row : row + 14, column : column + 14].transpose(2, 0, 1)
        np.testing.assert_array_equal(flat[i], patch.ravel())


def test_dicom():
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    def dicom(values, interpretation="MONOCHROME2", **fields):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
        meta.MediaStorageSOPInstanceUID = "1.2.3"
        record = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        values = np.asarray(values, np.int16)
        record.Rows, record.Columns = values.shape
        record.SamplesPerPixel, record.PhotometricInterpretation = 1, interpretation
        record.BitsAllocated, record.BitsStored, record.HighBit, record.PixelRepresentation = 16, 16, 15, 1
        for name, value in fields.items():
            setattr(record, name, value)
        record.PixelData = values.tobytes()
        out = io.BytesIO()
        pydicom.dcmwrite(out, record)
        return out.getvalue()

    grey = lambda data: np.asarray(images.read_image(data))[..., 0].tolist()
    # CT: stored 0 … 2000 is −1024 … 976 HU; the window 40 ± 200 is linear from −160 to 239
    ct = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    assert grey(dicom([[0, 864, 1063, 1263, 2000]], **ct)) == [[0, 0, 127, 255, 255]]
    assert grey(dicom([[864, 1263]], **ct, interpretation="MONOCHROME1")) == [[255, 0]]
    assert grey(dicom([[-5, 0, 5]])) == [[0, 128, 255]]
    with pytest.raises(DataError, match="4 frames"):
        images.read_image(dicom([[1]], NumberOfFrames=4))
