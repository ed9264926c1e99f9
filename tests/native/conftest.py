"""Every kernel is tested on every instruction set that runs here; without the native library these tests are skipped."""
from collections.abc import Iterator

import pytest

from tpllm.native import library

REASON = "the native library is not built here"
NAMES = library.instruction_sets() or (pytest.param("none", marks=pytest.mark.skip(reason=REASON)),)


@pytest.fixture(params=NAMES)
def instruction_set(request) -> Iterator[str]:
    """One instruction set, in use while the test runs."""
    with library.use_instruction_set(request.param):
        yield request.param
