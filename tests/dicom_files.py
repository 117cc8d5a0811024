"""DICOM files, made for tests."""
import warnings

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid


def dataset(pixels, photometric, bits=8, stored=None, syntax=ExplicitVRLittleEndian, **elements):
    """A DICOM file in memory; pixels are an array, or bytes that were encapsulated."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.PhotometricInterpretation = photometric
    ds.BitsAllocated, ds.BitsStored = bits, stored or bits
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, 0
    if isinstance(pixels, np.ndarray):
        ds.Rows, ds.Columns = pixels.shape[:2]
        ds.SamplesPerPixel = 3 if pixels.ndim == 3 else 1
        ds.PixelData = pixels.tobytes()
    else:
        ds.SamplesPerPixel, ds.PixelData = 3, pixels
    if ds.SamplesPerPixel == 3:
        ds.PlanarConfiguration = 0
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def save(ds, path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds.save_as(path, enforce_file_format=True)
    return path
