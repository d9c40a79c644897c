"""Small DICOM files made for tests, with what would name a patient in every place that has one."""

import io

import numpy as np
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

SECRET = "Zweigl-Quasselstrippe"
SECRET_ID = "8675309X"


def dicom_bytes(
    pixels: np.ndarray | bytes,
    *,
    syntax: str = uid.ExplicitVRLittleEndian,
    bits: int = 0,
    preamble: bool = True,
    **tags,
) -> bytes:
    """A file of pixels [h, w] or [h, w, 3] (or [n, h, w], [n, h, w, 3] with NumberOfFrames=n), or of encoded bytes.

    Args:
      tags: values of the data set by keyword, over those that follow from the pixels; None leaves one out.
    """
    found = Dataset()
    for keyword in ("PatientName", "OtherPatientNames", "ReferringPhysicianName", "OperatorsName"):
        setattr(found, keyword, f"{SECRET}^{keyword}")
    found.PatientID = found.AccessionNumber = SECRET_ID
    found.PatientAddress = found.InstitutionName = found.StudyDescription = f"{SECRET} street"
    found.PatientBirthDate, found.Modality = "19010203", "OT"
    own: dict = {"PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1, "PixelRepresentation": 0}
    if isinstance(pixels, np.ndarray):
        shape = pixels.shape[1:] if "NumberOfFrames" in tags else pixels.shape
        own |= {"Rows": shape[0], "Columns": shape[1], "BitsAllocated": 8 * pixels.itemsize}
        own["PixelRepresentation"] = int(pixels.dtype.kind == "i")
        if len(shape) == 3:
            own |= {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    own |= tags
    stored = bits or own["BitsAllocated"]
    own = {"BitsStored": stored, "HighBit": stored - 1} | own
    for keyword, value in own.items():
        if value is not None:
            setattr(found, keyword, value)
    content = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    if uid.UID(syntax).is_encapsulated:
        content = encapsulate([content])
    found.PixelData = content + b"\0" * (len(content) % 2)
    found["PixelData"].VR = "OB" if uid.UID(syntax).is_encapsulated or own["BitsAllocated"] <= 8 else "OW"
    found["PixelData"].is_undefined_length = uid.UID(syntax).is_encapsulated
    found.file_meta = FileMetaDataset()
    found.file_meta.TransferSyntaxUID = uid.UID(syntax)
    found.file_meta.MediaStorageSOPClassUID = uid.SecondaryCaptureImageStorage
    found.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    out = io.BytesIO()
    found.save_as(out, enforce_file_format=True)
    return out.getvalue() if preamble else out.getvalue()[132:]
