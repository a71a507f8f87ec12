"""The scale of one number is that of an array of one, also where the quick way ends."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from omni_convert.formats.scales import _NO_EDGE, absmax_scale, absmax_scales


@pytest.mark.parametrize(("largest", "clips"), [(127.0, 127.5), (448.0, 464.0)])
@given(amax=st.floats(0, allow_infinity=False, allow_nan=False, width=32))
@example(amax=0.0)
@example(amax=float(np.finfo(np.float32).max))
@example(amax=float(np.finfo(np.float32).smallest_subnormal))
@example(amax=_NO_EDGE[0])
@example(amax=_NO_EDGE[1])
@example(amax=float(np.nextafter(np.float32(_NO_EDGE[0]), np.float32(1))))
def test_one_number_as_an_array(amax: float, largest: float, clips: float) -> None:
    expected = absmax_scales(np.array([amax], np.float32), largest, clips, np)[0]
    found = np.float32(absmax_scale(amax, largest, clips))
    assert found.tobytes() == expected.tobytes()
