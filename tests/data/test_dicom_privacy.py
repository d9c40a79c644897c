"""No patient of a DICOM file is named in what its reader raises, warns, logs, prints or returns."""

import logging
import re
import traceback
import warnings

import numpy as np
import pydicom
import pytest
from dicom_files import SECRET, SECRET_ID, dicom_bytes
from pydicom import uid

from medcg_jax.data.images import ImageError, image_size, read_image
from medcg_jax.data.reading import Reading
from medcg_jax.data.records import DataError

MANY = 10_000_000
RAMP = np.arange(-1024, 3072, dtype=np.int16).reshape(64, 64)


def everything_said(action, caplog, capfd) -> str:
    """What an action raises, warns, logs, prints and returns, tracebacks of errors behind errors included."""
    said = []
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        try:
            said.append(repr(action()))
        except DataError as error:
            while error is not None:
                said += [repr(error), *traceback.format_exception(error)]
                error = error.__cause__ or error.__context__
    said += [str(warning.message) for warning in caught] + [caplog.text]
    return "\n".join([*said, *capfd.readouterr()])


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
def test_no_patient_is_named(syntax, caplog, capfd):
    whole = dicom_bytes(RAMP, syntax=syntax, WindowCenter=40, WindowWidth=400, Modality="CT", SpecificCharacterSet="")
    generator = np.random.default_rng(5)
    refused = 0
    secret = SECRET[:9].encode()
    for number in range(160):
        content = bytearray(whole)
        how = number % 4
        if how == 0:
            del content[int(generator.integers(132, len(content))) :]
        elif how == 1:
            for place in generator.integers(132, 900, 3):
                content[place] = generator.integers(256)
        elif how == 2:
            # A value's bytes run into their neighbours: names where numbers and code strings are read.
            place = int(generator.integers(132, 900))
            content[place : place + len(secret)] = secret
        else:
            place = int(generator.integers(132, 900))
            content[place:place] = secret[: int(generator.integers(1, 9))]
        said = everything_said(lambda content=bytes(content): read_image(content, MANY)[1], caplog, capfd)
        said += everything_said(lambda content=bytes(content): image_size(content, MANY), caplog, capfd)
        refused += "Error" in said
        assert SECRET[:6] not in said and SECRET_ID not in said, said
        caplog.clear()
    assert refused > 40


@pytest.mark.parametrize(
    "keyword",
    ["PhotometricInterpretation", "WindowCenter", "WindowWidth", "RescaleSlope", "VOILUTFunction", "Modality",
     "RescaleType", "NumberOfFrames", "SpecificCharacterSet"],
)  # fmt: skip
def test_a_name_in_a_tag_that_is_read_is_not_passed_on(keyword, caplog, capfd):
    dummy = {"PhotometricInterpretation": "MONOCHROME2", "NumberOfFrames": "1" * 8, "SpecificCharacterSet": "ISO_IR 6"}
    value = dummy.get(keyword, "12345678" if keyword[0] in "WR" and keyword != "RescaleType" else "ABCDEFGH")
    pixels = RAMP[None] if keyword == "NumberOfFrames" else RAMP
    numbers = {"WindowCenter": 1, "WindowWidth": 2, "RescaleSlope": 1, "RescaleIntercept": 0}
    content = dicom_bytes(pixels, **numbers | {keyword: value})
    planted = content.replace(value.encode(), SECRET.encode()[: len(value)].ljust(len(value)))
    assert planted != content and re.search(SECRET[:6].encode(), planted)
    for read in (lambda: read_image(planted, MANY, Reading(window="lung"))[1], lambda: image_size(planted, MANY)):
        said = everything_said(read, caplog, capfd)
        assert SECRET[:6] not in said, said


def process_settings():
    mode = pydicom.config.settings.reading_validation_mode
    return mode, logging.getLogger("pydicom").level, list(warnings.filters)


def test_pydicom_is_left_as_it_was():
    before = process_settings()
    read_image(dicom_bytes(RAMP), MANY)
    with pytest.raises(ImageError):
        read_image(dicom_bytes(RAMP, Rows=90), MANY)
    assert before == process_settings()
