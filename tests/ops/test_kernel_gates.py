"""What can be known of a kernel without a GPU: it compiles for each target, and spills nothing."""

from importlib.util import find_spec

import pytest

from fastdpo.ops import ahead_of_time

KERNELS = 32
FUSED_MATRIX = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "v_mfma"}
FUSED_ASYNC = {"sm_80": "cp.async", "sm_90": "TMA", "sm_100": "TMA", "gfx942": ""}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)")
@pytest.mark.parametrize(
    "target",
    [pytest.param(target, marks=[] if target == "sm_90" else pytest.mark.slow) for target in ahead_of_time.TARGETS],
)
def test_every_kernel_compiles_without_spills(target):
    rows = ahead_of_time.resources(target)
    for row in rows:
        assert row["spills"] == 0, row
        assert row["registers"] <= 255, row
        assert row["shared"] <= ahead_of_time.SHARED_LIMIT[target], row
        assert not row["tf32"], row
        assert not row["atomics"], row
        assert not row.get("serialized"), row
        if row["kernel"].startswith("fused"):
            assert row["matrix"] == FUSED_MATRIX[target], row
            # rows of an odd length have no descriptors, and loads of 2 bytes no asynchronous copies
            assert row["async"] == ("" if " odd" in row["kernel"] else FUSED_ASYNC[target]), row
    assert len({row["kernel"] for row in rows}) == len(rows) == KERNELS


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (Linux only)")
@pytest.mark.parametrize("target", ahead_of_time.TARGETS)
def test_tiles_worth_timing_compile_without_spills(target):
    rows = ahead_of_time.resources(target, candidates=True)
    assert len(rows) >= 15
    for row in rows:
        assert row["spills"] == 0, row
        assert row["shared"] <= ahead_of_time.SHARED_LIMIT[target], row
        assert row["matrix"] == FUSED_MATRIX[target], row
