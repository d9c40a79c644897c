"""DICOM files: windows, photometric interpretations, frames, codecs, and what is refused."""

import io
import signal
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import dicom_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_windowing
from pydicom.pixels import pixel_array as pydicoms

from medcg_jax.data.images import ImageError, image_size, load_image, read_image
from medcg_jax.data.reading import PRESETS_HU, Reading

MANY = 10_000_000
RAMP = np.arange(-1024, 3072, dtype=np.int16).reshape(64, 64)
CT = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "HU"}


def grey(content: bytes, reading: Reading = Reading()) -> np.ndarray:
    found = load_image(content, MANY, reading)
    assert found.dtype == np.uint8 and (found == found[..., :1]).all()
    return found[..., 0]


def bundled(name: str) -> str:
    return get_testdata_file(name, download=False)


def lut(entries: np.ndarray, bits: int, first: int = 0) -> Dataset:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries), first, bits], entries.astype("<u2").tobytes()
    return item


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["LINEAR", "LINEAR_EXACT", "SIGMOID"]),
    st.floats(-900, 2500),
    st.floats(2, 3000),
    st.sampled_from([0.5, 1, 2]),
    st.integers(-1024, 100),
)
def test_windows_are_pydicoms(function, center, width, slope, intercept):
    center, width = round(center, 3), round(width, 3)
    tags = dict(WindowCenter=center, WindowWidth=width, VOILUTFunction=function, RescaleSlope=slope)
    content = dicom_bytes(RAMP, RescaleIntercept=intercept, **tags)
    dataset = pydicom.dcmread(io.BytesIO(content))
    wanted = apply_windowing(RAMP * slope + intercept, dataset)
    # pydicom's go from the least value that may be stored to the greatest, in units of the rescale.
    low, high = -32768 * slope + intercept, 32767 * slope + intercept
    assert np.abs(grey(content) - (wanted - low) / (high - low) * 255.0).max() <= 0.5001


def test_the_first_window_that_can_be_used_is_taken():
    several = dicom_bytes(RAMP, WindowCenter=[40, 600], WindowWidth=[400, 1200])
    assert (grey(several) == grey(dicom_bytes(RAMP, WindowCenter=40, WindowWidth=400))).all()
    for tags in (
        {"WindowCenter": [40, 600], "WindowWidth": [400, 1200]},
        {"WindowCenter": [0, 40], "WindowWidth": [0, 400]},
    ):
        assert read_image(dicom_bytes(RAMP, **tags), MANY)[1] == "DICOM window 40/400 of the file"


@pytest.mark.parametrize("name", PRESETS_HU)
def test_a_preset_is_its_window_in_hu(name):
    stored = (RAMP + 1024).astype(np.uint16)
    tags = {**CT, "RescaleIntercept": -1024}
    found, how = read_image(dicom_bytes(stored, WindowCenter=1, WindowWidth=2, **tags), MANY, Reading(window=name))
    center, width = PRESETS_HU[name]
    assert how == f"DICOM window {name} {center}/{width}"
    black, white = center - width / 2, center + width / 2
    assert (found[black - 1 > RAMP] == 0).all() and (found[white + 1 < RAMP] == 255).all()
    assert 100 < found[center == RAMP].mean() < 155


@pytest.mark.parametrize(
    "tags", [{**CT, "Modality": "MR"}, {**CT, "RescaleSlope": None}, {**CT, "RescaleType": "US"}, {"Modality": "CT"}]
)
def test_a_preset_is_for_ct_in_hu_alone(tags):
    content = dicom_bytes(RAMP, WindowCenter=500, WindowWidth=1000, **tags)
    found, how = read_image(content, MANY, Reading(window="lung"))
    assert how == "DICOM window 500/1000 of the file (lung is for CT in HU)"
    assert (found == load_image(content, MANY)).all()


def test_a_window_in_numbers_is_for_all():
    content = dicom_bytes(RAMP, WindowCenter=500, WindowWidth=1000, Modality="MR")
    found, how = read_image(content, MANY, Reading(window="-600/1500"))
    assert how == "DICOM window -600/1500"
    assert (found[..., 0] == grey(dicom_bytes(RAMP, **CT), Reading(window="lung"))).all()


@pytest.mark.parametrize("window", [{}, dict(WindowCenter=5, WindowWidth=0), dict(WindowCenter=5, WindowWidth=-3)])
def test_without_a_window_percentiles_are_used(window):
    pixels = RAMP.copy()
    pixels[0, :8] = 30000
    found, how = read_image(dicom_bytes(pixels, **window), MANY)
    assert how == "DICOM percentiles 0.5 to 99.5"
    assert found[0, :8].min() == 255 and 60 < np.median(found) < 190


def test_the_padding_is_no_part_of_the_percentiles():
    pixels = np.full((64, 64), -2000, np.int16)
    pixels[16:48, 16:48] = np.arange(1024).reshape(32, 32)
    assert grey(dicom_bytes(pixels, PixelPaddingValue=-2000))[16, 16:20].max() < 5
    assert grey(dicom_bytes(pixels))[16, 16:20].min() > 100


def test_unsigned_greys_of_eight_bits_stay_as_they_are():
    pixels = np.arange(40, 140, dtype=np.uint8).reshape(10, 10)
    assert (grey(dicom_bytes(pixels)) == pixels).all()
    assert read_image(dicom_bytes(pixels), MANY)[1] == "DICOM greys as stored"
    assert (grey(dicom_bytes(pixels, PhotometricInterpretation="MONOCHROME1")) == 255 - pixels).all()


def test_monochrome1_is_inverted():
    window = dict(WindowCenter=500, WindowWidth=1000)
    found, how = read_image(dicom_bytes(RAMP, PhotometricInterpretation="MONOCHROME1", **window), MANY)
    assert how.endswith("of the file, inverted")
    assert (found[..., 0] == 255 - grey(dicom_bytes(RAMP, **window))).all()


@pytest.mark.parametrize("bits", range(8, 17))
@pytest.mark.parametrize("signed", [False, True])
def test_only_the_stored_bits_count(bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    values = np.linspace(low, low + 2**bits - 1, 256).round().astype(np.int64).reshape(16, 16)
    stored = (values & (2**bits - 1)).astype(np.uint16)
    junk = (0xFFFF << bits & 0xFFFF) & 0xA5A5
    content = dicom_bytes(stored | junk, bits=bits, PixelRepresentation=int(signed))
    reading = Reading(window=f"{low + 2 ** (bits - 1)}/{2**bits}")
    assert np.abs(grey(content, reading).ravel() - np.arange(256.0)).max() <= 1


def test_lookup_tables_are_applied():
    modality = lut(np.arange(0, 2560, 10), 16)
    modality.ModalityLUTType = "US"
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    content = dicom_bytes(pixels, ModalityLUTSequence=[modality], WindowCenter=1280, WindowWidth=2560)
    assert np.abs(grey(content).ravel() - np.arange(256.0)).max() <= 1
    found, how = read_image(dicom_bytes(pixels, VOILUTSequence=[lut(4095 - 16 * np.arange(256), 12)]), MANY)
    assert how == "DICOM VOI LUT of the file"
    assert np.abs(found[..., 0].ravel() - (255.0 - np.arange(256))).max() <= 1


def test_each_frames_own_groups_hold():
    def group(center, intercept):
        window, rescale, found = Dataset(), Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = center, 400
        rescale.RescaleSlope, rescale.RescaleIntercept, rescale.RescaleType = 1, intercept, "HU"
        found.FrameVOILUTSequence, found.PixelValueTransformationSequence = [window], [rescale]
        return found

    pixels = np.stack([RAMP, RAMP])
    groups = [group(40, 0), group(600, -100)]
    content = dicom_bytes(pixels, NumberOfFrames=2, Modality="CT", PerFrameFunctionalGroupsSequence=groups)
    found, how = read_image(content, MANY, Reading(frame="last"))
    assert how == "DICOM window 600/400 of the file, frame 2 of 2"
    assert (found[..., 0] == grey(dicom_bytes(RAMP, WindowCenter=700, WindowWidth=400))).all()
    shared = dicom_bytes(RAMP, Modality="CT", SharedFunctionalGroupsSequence=[group(40, -24)])
    assert read_image(shared, MANY, Reading(window="brain"))[1] == "DICOM window brain 40/80"


@pytest.mark.parametrize("frame, taken", [("first", 0), ("middle", 2), ("last", 4), ("0", 0), ("3", 3)])
def test_one_frame_is_taken(frame, taken):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7), np.uint8)
    found, how = read_image(dicom_bytes(pixels, NumberOfFrames=5), MANY, Reading(frame=frame))
    assert (found[..., 0] == pixels[taken]).all() and how.endswith(f", frame {taken + 1} of 5")
    with pytest.raises(ImageError, match=r"5 frames; data.frame=5 \(from 0\)"):
        load_image(dicom_bytes(pixels, NumberOfFrames=5), MANY, Reading(frame="5"))


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_colours_in_either_order(planar, syntax):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 10, 3), np.uint8)
    stored = pixels.transpose(2, 0, 1) if planar else pixels
    content = dicom_bytes(
        stored.tobytes(), syntax=syntax, Rows=8, Columns=10, SamplesPerPixel=3, PhotometricInterpretation="RGB",
        BitsAllocated=8, PlanarConfiguration=planar,
    )  # fmt: skip
    assert (load_image(content, MANY) == pixels).all() and image_size(content, MANY) == (8, 10)


def test_ybr_becomes_rgb():
    pixels = np.asarray(Image.linear_gradient("L").resize((16, 16)))
    colors = np.stack([pixels, pixels.T, pixels[::-1]], -1)
    ybr = np.asarray(Image.fromarray(colors).convert("YCbCr"))
    found = load_image(dicom_bytes(ybr, PhotometricInterpretation="YBR_FULL"), MANY)
    assert np.abs(found.astype(int) - colors).max() <= 3


@pytest.mark.parametrize("depth", [8, 16])
def test_palettes(depth):
    pixels = np.random.default_rng(2).integers(0, 256, (8, 8), np.uint8)
    tables = np.random.default_rng(3).integers(0, 256, (3, 256)).astype("<u2")
    tags = {}
    for color, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        tags[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, depth]
        data = table.astype(np.uint8) if depth == 8 else table << 8
        tags[f"{color}PaletteColorLookupTableData"] = data.tobytes()
    content = dicom_bytes(pixels, PhotometricInterpretation="PALETTE COLOR", **tags)
    found, how = read_image(content, MANY)
    assert how == "DICOM palette" and (found == tables[:, pixels].transpose(1, 2, 0)).all()
    # Entries of 8 bits in words of 16; values beyond the table take its last entry.
    wide = {key: tables[0].tobytes() if key.endswith("Data") else [256, 0, 16] for key in tags}
    deep = np.array([[0, 255, 256, 60000]], np.uint16)
    found = load_image(dicom_bytes(deep, PhotometricInterpretation="PALETTE COLOR", **wide), MANY)
    assert (found[0, :, 0] == tables[0][[0, 255, 255, 255]]).all()
    with pytest.raises(ImageError, match="segmented"):
        load_image(dicom_bytes(pixels, PhotometricInterpretation="PALETTE COLOR"), MANY)


SAME = ["MR_small_RLE", "MR_small_bigendian", "MR_small_implicit", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless"]


@pytest.mark.parametrize("name", SAME)
def test_one_image_is_the_same_in_every_transfer_syntax(name):
    wanted, how = read_image(bundled("MR_small.dcm"), MANY)
    found, same = read_image(bundled(f"{name}.dcm"), MANY)
    assert how == same == "DICOM window 600/1600 of the file" and (found == wanted).all()


@pytest.mark.parametrize("name", ["SC_rgb_rle", "SC_rgb_jpeg_gdcm", "SC_rgb_gdcm_KY", "SC_rgb_jls_lossy_line",
                                  "SC_rgb_dcmtk_+eb+cy+np", "SC_rgb_dcmtk_+eb+cr", "SC_ybr_full_422_uncompressed",
                                  "SC_rgb_jpeg_dcmtk", "SC_rgb_jpeg_lossy_gdcm"])  # fmt: skip
def test_colours_of_every_codec(name):
    found = load_image(bundled(f"{name}.dcm"), MANY)
    # Bands of ten rows, top to bottom: red, pink, green, light green, blue, light blue, black, greys, white.
    wanted = [(255, 0, 0), (255, 128, 128), (0, 255, 0), (128, 255, 128), (0, 0, 255), (128, 128, 255), (0, 0, 0)]
    assert np.abs(found[5:70:10, 50].astype(int) - wanted).max() <= 6
    assert found[95, 50].min() >= 250
    assert (found == pydicoms(bundled(f"{name}.dcm"))).all()


def test_what_aborts_gdcm_is_refused(monkeypatch):
    content = bytearray(Path(bundled("SC_rgb_jpeg_gdcm.dcm")).read_bytes())
    # Without its Huffman table GDCM throws through C code, which ends the process.
    content[content.rindex(b"\xff\xc4")] = 0xDF
    ends, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: ends.append(run(*a, **k)) or ends[-1])
    with pytest.raises(ImageError, match="lossless JPEG data cannot be decoded"):
        load_image(bytes(content), MANY)
    assert [done.returncode for done in ends] == [-signal.SIGABRT]


def test_lossless_jpeg_has_its_end():
    content = Path(bundled("SC_rgb_jpeg_gdcm.dcm")).read_bytes()
    place = content.rindex(b"\xff\xd9")
    with pytest.raises(ImageError, match="without its end"):
        load_image(content[:place] + b"\0\0" + content[place + 2 :], MANY)


def test_one_bit_and_deflated():
    assert set(np.unique(load_image(bundled("liver_1frame.dcm"), MANY))) == {0, 255}
    assert read_image(bundled("image_dfl.dcm"), MANY)[0].std() > 10


def test_a_deflated_bomb_is_refused(monkeypatch):
    content = dicom_bytes(np.zeros((3000, 3000), np.uint16), syntax=uid.DeflatedExplicitVRLittleEndian)
    assert len(content) < 100_000 and load_image(content, MANY).max() == 0
    monkeypatch.setattr("medcg_jax.data.dicom.MAX_INFLATED_BYTES", 2**20)
    with pytest.raises(ImageError, match="more than 1048576 bytes"):
        load_image(content, MANY)
    monkeypatch.undo()
    with pytest.raises(ImageError, match="cut short"):
        load_image(content[:-40], MANY)


def test_the_name_says_nothing_and_the_preamble_may_be_missing(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    path = tmp_path / "photo.jpg"
    path.write_bytes(dicom_bytes(pixels))
    assert (load_image(path, MANY)[..., 0] == pixels).all()
    path.write_bytes(dicom_bytes(pixels, preamble=False))
    assert (load_image(path, MANY)[..., 0] == pixels).all() and image_size(path, MANY) == (8, 8)
    both = bytearray(dicom_bytes(pixels))
    both[:8] = b"II*\0\x08\0\0\0"
    assert (load_image(bytes(both), MANY)[..., 0] == pixels).all()
    with pytest.raises(ImageError, match="not an image of a known format"):
        load_image(dicom_bytes(pixels, preamble=False)[200:], MANY)


def broken(**tags):
    shape = (1, 8, 8) if "NumberOfFrames" in tags else (8, 8)
    return dicom_bytes(np.zeros(shape, np.uint8), **tags)


@pytest.mark.parametrize(
    "content, said",
    [
        (broken(Rows=60000, Columns=60000), "60000 x 60000 pixels; expected at most"),
        (broken(Rows=1, Columns=60000), "pad to 60000 x 60000; expected at most"),
        (broken(Rows=9), "pixel data are shorter than the header declares"),
        (broken(NumberOfFrames=2**31 - 1, Rows=8, Columns=8), "pixel data are shorter"),
        (broken()[:-2], "pixel data are shorter"),
        (broken()[:400], "holds no pixels|cut short within the header"),
        (broken(Rows=0), "8 x 0 pixels"),
        (broken(Rows=None), r"Rows \(0028,0010\) is missing"),
        (broken(BitsAllocated=32), "32 bits allocated"),
        (broken(BitsStored=0, HighBit=0), "0 stored"),
        (broken(BitsStored=4, HighBit=7), "HighBit is not"),
        (broken(PhotometricInterpretation="CMYK"), "photometric interpretation that is not read"),
        (broken(SamplesPerPixel=3), "photometric interpretation that is not read"),
        (broken(NumberOfFrames=-1), r"\(0028,0008\): NumberOfFrames is below 1"),
    ],
)
def test_what_is_refused_from_the_header(content, said, monkeypatch):
    monkeypatch.setattr("medcg_jax.data.dicom._decode", lambda *_: pytest.fail("decoded"))
    for read in (load_image, image_size):
        with pytest.raises(ImageError, match=said):
            read(content, MANY)


@pytest.mark.parametrize("name, syntax", [
    ("JPEG", uid.JPEGBaseline8Bit), ("JPEG2000", uid.JPEG2000Lossless), ("JPEG", uid.JPEG2000),
    ("JPEG", uid.JPEGLSLossless), ("JPEG", uid.JPEGLosslessSV1), ("PNG", uid.JPEGBaseline8Bit),
])  # fmt: skip
def test_a_codestream_of_another_size_or_kind_is_refused_before_it_is_decoded(name, syntax, monkeypatch):
    out = io.BytesIO()
    Image.new("L", (500, 400)).save(out, name, **({"no_jp2": True} if name == "JPEG2000" else {}))
    content = dicom_bytes(out.getvalue(), syntax=syntax, Rows=8, Columns=8, BitsAllocated=8)
    for name in ("get_decoder", "decode_lossless"):
        monkeypatch.setattr(f"medcg_jax.data.dicom.{name}", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="another size or number of channels|are no JPEG"):
        load_image(content, MANY)


def test_codestreams_that_loop_or_are_cut_are_refused():
    jp2 = b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40)
    with pytest.raises(ImageError, match="no JPEG 2000 codestream"):
        load_image(dicom_bytes(jp2, syntax=uid.JPEG2000, Rows=8, Columns=8, BitsAllocated=8), MANY)
    for name in (*SAME[:1], *SAME[3:], "SC_rgb_jpeg_gdcm", "SC_rgb_jpeg_dcmtk"):
        content = Path(bundled(f"{name}.dcm")).read_bytes()
        start = content.rindex(b"\xe0\x7f\x10\x00")
        for stop in range(start + 20, content.rindex(b"\xfe\xff\xdd\xe0"), 97):
            with pytest.raises(ImageError, match="cut short"):
                load_image(content[:stop], MANY)


def test_only_one_frame_is_decoded():
    content = dicom_bytes(np.zeros((500, 8, 8), np.uint8), NumberOfFrames=500)
    sizes = []

    class Counting(io.BytesIO):
        def read(self, size=-1):
            found = super().read(size)
            sizes.append(len(found))
            return found

    from medcg_jax.data.dicom import read_dicom

    read_dicom(Counting(content), MANY, Reading())
    assert sum(sizes) < 3000 < len(content)


def test_the_packs_own_files(shared_dir):
    odd = shared_dir / "data" / "medmat-mini" / "odd-formats"
    found, how = read_image(odd / "CT_small.dcm", MANY)
    assert how == "DICOM percentiles 0.5 to 99.5"
    for name in ("CT_small_16bit.png", "CT_small_16bit.tiff"):
        other = load_image(odd / name, MANY)
        assert np.corrcoef(found[..., 0].ravel(), other[..., 0].ravel())[0, 1] > 0.97
    assert read_image(odd / "CT_small.dcm", MANY, Reading(window="bone"))[1] == "DICOM window bone 400/1800"
    found, how = read_image(odd / "MR_small.dcm", MANY)
    assert how == "DICOM window 600/1600 of the file" and found.shape == (64, 64, 3) and found.std() > 30


# --- what scanners and converters write

HALVES = np.zeros((16, 16, 3), np.uint8)
HALVES[:, :8], HALVES[:, 8:] = (200, 30, 30), (30, 30, 200)
DEEP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16
RGB_TAGS = dict(Rows=16, Columns=16, SamplesPerPixel=3, BitsAllocated=8)


def codestream(pixels: np.ndarray, name: str, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, name, **options)
    return out.getvalue()


def compressed(kind: str) -> bytes:
    """`HALVES`, whose header says that samples lie plane by plane."""
    tags = RGB_TAGS | {"PlanarConfiguration": 1}
    if kind == "JPEG":
        content, colors = codestream(HALVES, "JPEG", quality=100, subsampling=0), "YBR_FULL_422"
        return dicom_bytes(content, syntax=uid.JPEGBaseline8Bit, PhotometricInterpretation=colors, **tags)
    if kind == "JPEG 2000":
        content = codestream(HALVES, "JPEG2000", no_jp2=True, mct=1)
        return dicom_bytes(content, syntax=uid.JPEG2000Lossless, PhotometricInterpretation="YBR_RCT", **tags)
    dataset = pydicom.dcmread(io.BytesIO(dicom_bytes(HALVES)))
    syntax = {"RLE": uid.RLELossless, "JPEG-LS": uid.JPEGLSLossless}[kind]
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.PlanarConfiguration = 1
    out = io.BytesIO()
    dataset.save_as(out)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "JPEG 2000", "RLE", "JPEG-LS"])
def test_decoders_give_samples_pixel_by_pixel_whatever_the_header_says(kind):
    found = load_image(compressed(kind), MANY)
    assert np.abs(found.astype(int) - HALVES).max() <= (3 if kind == "JPEG" else 0)


def test_lossless_jpeg_is_right_whatever_the_planar_configuration():
    dataset = pydicom.dcmread(bundled("SC_rgb_jpeg_gdcm.dcm"))
    dataset.PlanarConfiguration = 1
    out = io.BytesIO()
    dataset.save_as(out)
    assert (load_image(out.getvalue(), MANY) == load_image(bundled("SC_rgb_jpeg_gdcm.dcm"), MANY)).all()


def test_without_planar_configuration_samples_lie_pixel_by_pixel():
    assert (load_image(dicom_bytes(HALVES, PlanarConfiguration=None), MANY) == HALVES).all()


def test_jpeg_of_eight_bits_in_words_of_sixteen():
    pixels = HALVES[..., 0]
    tags = dict(Rows=16, Columns=16, BitsAllocated=16, bits=8)
    found, how = read_image(dicom_bytes(codestream(pixels, "JPEG"), syntax=uid.JPEGBaseline8Bit, **tags), MANY)
    assert how == "DICOM greys as stored" and np.abs(found[..., 0].astype(int) - pixels).max() <= 3


@pytest.mark.parametrize("number", [0, ""])
def test_no_number_of_frames_is_one(number):
    content = dicom_bytes(RAMP[None], NumberOfFrames=number, Rows=64, Columns=64)
    assert (load_image(content, MANY) == load_image(dicom_bytes(RAMP), MANY)).all()


def test_a_window_with_a_decimal_comma_is_left_out_and_named():
    content = dicom_bytes(RAMP, WindowCenter="40.5", WindowWidth="400", **CT).replace(b"40.5", b"40,5")
    found, how = read_image(content, MANY)
    assert how.startswith("DICOM percentiles 0.5 to 99.5 (the file's window is left out: WindowCenter (0028,1050)")
    assert (found == load_image(dicom_bytes(RAMP, **CT), MANY)).all()
    slope = dicom_bytes(RAMP, **CT | {"RescaleSlope": "1.25"}).replace(b"1.25", b"1,25")
    with pytest.raises(ImageError, match=r"RescaleSlope \(0028,1053\) cannot be read as numbers"):
        load_image(slope, MANY)


@pytest.mark.parametrize("items", [[Dataset()], [Dataset(), Dataset()]])
def test_a_voi_lut_without_a_table_is_none(items):
    window = dict(WindowCenter=1000, WindowWidth=2000)
    found, how = read_image(dicom_bytes(RAMP, VOILUTSequence=items, **window), MANY)
    assert how == "DICOM window 1000/2000 of the file"
    assert (found == load_image(dicom_bytes(RAMP, **window), MANY)).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("declared, said", [(16, " (entries of 12 bits, 16 declared)"), (12, ""), (8, " (entries")])
def test_a_voi_lut_has_the_bits_of_its_entries(photometric, declared, said):
    content = dicom_bytes(
        DEEP, bits=12, VOILUTSequence=[lut(np.arange(4096), declared)], PhotometricInterpretation=photometric
    )
    found, how = read_image(content, MANY)
    assert how.startswith(f"DICOM VOI LUT of the file{said}")
    assert sorted((int(found.min()), int(found.max()))) == ([0, 254] if photometric == "MONOCHROME2" else [1, 255])


def test_tables_are_read_by_the_sign_of_the_pixels_and_the_files_order_of_bytes():
    # 64536 is -1000 where values have a sign; big-endian tables are big-endian.
    item = lut(np.linspace(0, 65535, 4096), 16)
    item.add_new("LUTDescriptor", "US", [4096, 64536, 16])
    ramp = RAMP.clip(-1000, 3000)
    found = grey(dicom_bytes(ramp, VOILUTSequence=[item]))
    assert np.abs(found - np.round((ramp + 1000) / 4095 * 255.0)).max() <= 1
    tags = {}
    for color in ("Red", "Green", "Blue"):
        tags[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{color}PaletteColorLookupTableData"] = (np.arange(256) * 257).astype(">u2").tobytes()
    pixels = np.arange(256, dtype=">u2").reshape(16, 16)
    big = dicom_bytes(pixels, syntax=uid.ExplicitVRBigEndian, PhotometricInterpretation="PALETTE COLOR", **tags)
    assert (load_image(big, MANY)[..., 0] == pixels).all()
    short = lut(np.arange(100), 16)
    short.LUTDescriptor = [4096, 0, 16]
    with pytest.raises(ImageError, match=r"LUTData \(0028,3006\) has .* entries; its descriptor says 4096"):
        load_image(dicom_bytes(RAMP, VOILUTSequence=[short]), MANY)


def test_padding_counts_in_no_way_of_writing_it():
    pixels = np.random.default_rng(0).integers(0, 1000, (16, 16)).astype(np.int16)
    pixels[:4] = -2000
    wanted = grey(dicom_bytes(pixels, PixelPaddingValue=-2000))
    assert wanted[4:].std() > 60
    unsigned = dicom_bytes(pixels, PixelPaddingValue=-2000).replace(b"\x20\x01SS", b"\x20\x01US")
    assert unsigned != dicom_bytes(pixels, PixelPaddingValue=-2000) and (grey(unsigned) == wanted).all()
    ranged = pixels.copy()
    ranged[:4] = np.linspace(-2000, -1500, 64).reshape(4, 16)
    for ends in ((-2000, -1500), (-1500, -2000)):
        content = dicom_bytes(ranged, PixelPaddingValue=ends[0], PixelPaddingRangeLimit=ends[1])
        assert (grey(content)[4:] == wanted[4:]).all()


@pytest.mark.parametrize("content", [
    dicom_bytes(DEEP.tobytes(), Rows=16, Columns=16, BitsAllocated=8),
    dicom_bytes(np.stack([DEEP] * 3).tobytes(), Rows=16, Columns=16, BitsAllocated=16),
    dicom_bytes(HALVES.tobytes() + b"\0\0", PhotometricInterpretation="RGB", PlanarConfiguration=0, **RGB_TAGS),
])  # fmt: skip
def test_pixels_longer_than_declared_are_refused(content):
    for read in (load_image, image_size):
        with pytest.raises(ImageError, match=r"longer than the header declares: PixelData \(7FE0,0010\) has"):
            read(content, MANY)


def test_more_compressed_frames_than_declared_are_refused():
    jpeg = codestream(HALVES[..., 0], "JPEG")
    jpeg += b"\0" * (len(jpeg) % 2)
    one = dicom_bytes(jpeg, syntax=uid.JPEGBaseline8Bit, Rows=16, Columns=16, BitsAllocated=8)
    item = b"\xfe\xff\x00\xe0" + len(jpeg).to_bytes(4, "little") + jpeg
    assert one.count(item) == 1 and load_image(one, MANY).shape == (16, 16, 3)
    with pytest.raises(ImageError, match=r"2 frames; NumberOfFrames \(0028,0008\) declares 1"):
        load_image(one.replace(item, item * 2), MANY)


def test_colours_of_all_samples_that_are_called_subsampled():
    ybr = np.asarray(Image.fromarray(HALVES).convert("YCbCr"))
    tags = RGB_TAGS | {"PhotometricInterpretation": "YBR_FULL_422", "PlanarConfiguration": 0}
    assert np.abs(load_image(dicom_bytes(ybr.tobytes(), **tags), MANY).astype(int) - HALVES).max() <= 3
    with pytest.raises(ImageError, match="YBR_RCT colours, which are JPEG 2000's alone"):
        load_image(dicom_bytes(HALVES, PhotometricInterpretation="YBR_RCT"), MANY)


def test_elements_and_their_depth_are_bounded():
    content = dicom_bytes(DEEP)
    place = content.index(b"\x28\x00\x02\x00US")
    many = content[:place] + b"\x09\x00\x10\x10LO\x00\x00" * 500_000 + content[place:]
    deep = content[:place] + (b"\x09\x00\x10\x10SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 20_000
    for bomb, said in ((many, "more than 300,000 pieces .DICOM elements"), (deep, "cannot be")):
        with pytest.raises(ImageError, match=said):
            load_image(bomb, MANY)
