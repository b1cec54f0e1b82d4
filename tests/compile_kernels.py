"""Compiles every kernel ahead of time, without a GPU, and prints one JSON line each: registers, spills, shared memory.

Run as a script by test_kernel_gates.py, in a process without the interpreter.
"""

import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdpo.kernels import fold, logprob, segments

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
FLAGS = ("BIAS", "CAP", "ENTROPY", "SUM_SQ", "MEAN", "WRITE")


def sources() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """name -> (kernel, signature, constants, warps), at the launchers' own sizes."""
    fp32 = dict.fromkeys(("m_ptr", "s_ptr", "zy_ptr", "t_ptr", "sq_ptr", "zsum_ptr", "ratio_ptr", "drop_ptr"), "*fp32")
    scalars = dict.fromkeys(("scale", "inv_softcap", "cap"), "fp32")
    sizes = {"n_cols": "i32", "stride_z": "i32", "stride_e": "i32"}
    found = {}
    for e_type in ("bf16", "fp32"):
        for name, on in (("stats", ()), ("write", ("WRITE",)), ("everything", FLAGS)):
            signature = {"z_ptr": "*fp32", "e_ptr": f"*{e_type}", "local_ptr": "*i64", "bias_ptr": "*fp32"}
            signature |= fp32 | sizes | scalars
            constants = {"BLOCK": 4096, **{flag: flag in on for flag in FLAGS}}
            found[f"fold {e_type} {name}"] = (fold._fold_kernel, signature, constants, 8)
        rows = dict.fromkeys(("m_ptr", "others_ptr", "target_ptr", "entropy_ptr", "offset_ptr"), "*fp32")
        for name, on in (("plain", ()), ("kept", ("KEPT",)), ("everything", ("BIAS", "CAP", "ENTROPY"))):
            z_type = e_type if name == "kept" else "fp32"
            signature = {"z_ptr": f"*{z_type}", "e_ptr": f"*{e_type}", "local_ptr": "*i64", "bias_ptr": "*fp32"}
            signature |= rows | sizes | scalars | {"slope": "fp32"}
            constants = {"BLOCK": 1024, **{flag: flag in on for flag in ("BIAS", "CAP", "ENTROPY", "KEPT")}}
            found[f"dlogits {e_type} {name}"] = (fold._dlogits_kernel, signature, constants, 4)
        signature = {"x_ptr": f"*{e_type}", "label_ptr": "*i64", "m_ptr": "*fp32", "s_ptr": "*fp32", "zy_ptr": "*fp32"}
        signature |= {"V": "i32", "stride_x": "i32", "inv_t": "fp32"}
        found[f"logprob_fwd {e_type}"] = (logprob._logprob_fwd_kernel, signature, {"BLOCK": 4096}, 8)
        signature = {"x_ptr": f"*{e_type}", "dx_ptr": f"*{e_type}", "label_ptr": "*i64"}
        signature |= dict.fromkeys(("base_ptr", "others_ptr", "target_ptr"), "*fp32")
        signature |= {"V": "i32", "stride_x": "i32", "stride_dx": "i32", "inv_t": "fp32"}
        found[f"logprob_bwd {e_type}"] = (logprob._logprob_bwd_kernel, signature, {"BLOCK": 4096}, 8)
    signature = {"value_ptr": "*fp32", "offset_ptr": "*i64", "out_ptr": "*fp32"}
    found["segment_sum"] = (segments._segment_sum_kernel, signature, {"BLOCK": 1024}, 4)
    return found


def compile_one(kernel: Any, signature: dict[str, str], constants: dict[str, Any], warps: int, target: Any) -> dict:
    types = {**signature, **dict.fromkeys(constants, "constexpr")}
    aligned = [i for i, name in enumerate(kernel.arg_names) if types[name].startswith("*")]
    source = ASTSource(
        kernel,
        signature={name: types[name] for name in kernel.arg_names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    built = triton.compile(source, target=target, options={"num_warps": warps})
    text = built.asm["ptx"] if "ptx" in built.asm else built.asm["amdgcn"]
    found = {"shared": built.metadata.shared, "tf32": "tf32" in text, "atomics": bool(re.search(r"\batom", text))}
    if "amdgcn" in built.asm:
        found["registers"] = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        found["spills"] = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])
    return found


def main() -> None:
    for target_name in sys.argv[1:]:
        for name, (kernel, signature, constants, warps) in sources().items():
            print(f"== {name}", file=sys.stderr, flush=True)
            found = compile_one(kernel, signature, constants, warps, TARGETS[target_name])
            print(json.dumps({"kernel": name, "target": target_name, **found}), flush=True)


if __name__ == "__main__":
    main()
