"""`loaders.datatypes` against the Open Inference Protocol's table of tensor data types."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loaders.datatypes import DTYPES, bytes_of, datatype_of, text_of

SIZES = {"BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8}
SIZES |= {"FP16": 2, "FP32": 4, "FP64": 8, "BF16": 2}


def test_every_datatype_has_its_size_and_its_way_back() -> None:  # Open Inference Protocol, "Tensor Data Types"
    assert {name: dtype.itemsize for name, dtype in DTYPES.items() if name != "BYTES"} == SIZES
    assert all(datatype_of(dtype) == name for name, dtype in DTYPES.items())


@pytest.mark.parametrize(
    ("dtype", "name"), [(">f4", "FP32"), ("U3", "BYTES"), ("S3", "BYTES"), (ml_dtypes.bfloat16, "BF16")]
)
def test_other_forms_of_a_datatype(dtype: str, name: str) -> None:
    assert datatype_of(np.dtype(dtype)) == name


def test_complex_numbers_have_no_datatype() -> None:
    with pytest.raises(ValueError, match="no datatype for numpy complex64"):
        datatype_of(np.dtype(np.complex64))


@given(st.lists(st.text(), max_size=6))
def test_text_and_bytes_are_each_others_inverse(words: list[str]) -> None:
    tensor = bytes_of(np.array([words, words], dtype=object))
    assert tensor.shape == (2, len(words))
    assert all(isinstance(element, bytes) for element in tensor.flat)
    assert text_of(tensor).tolist() == [words, words]


def test_bytes_of_numpy_strings() -> None:
    assert bytes_of(np.array(["é", "b"])).tolist() == ["é".encode(), b"b"]
    assert bytes_of(np.array(b"x", dtype=object)).tolist() == b"x"
