"""What can be known of a kernel without a GPU: it is compiled for each architecture, and its resources are read back.

`resources("sm_90")` does it in a process of its own (the interpreter must be off, and some failures of a compiler
end the process). Each kernel is compiled as its launcher would, with few and with all of its options.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a block
TARGETS = tuple(SHARED_LIMIT)
_STATS = ("ENTROPY", "SUM_SQ", "MEAN")


@dataclass(frozen=True)
class Build:
    """One kernel at one set of options."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    aligned: tuple[str, ...] = field(default=())  # integers that are multiples of 16


def builds(target: str) -> dict[str, Build]:
    """name -> build, at the launchers' own sizes."""
    return {**_fold_builds(), **_logprob_builds(), **_row_builds(), **_fused_builds(target)}


def candidate_builds(target: str) -> dict[str, Build]:
    """The fused kernels as they mostly run, with every tile that a tuner would try."""
    from fastdpo.kernels import configs

    kernels = {}
    for config in configs.candidates(target):
        with configs.override(config):
            for name, build in _fused_builds(target).items():
                rare = any(word in name for word in ("fp16", "all", "odd"))
                if name.endswith((" stats", " write", " plain")) and not rare:
                    kernels[f"{name} {config}"] = build
    return kernels


def _fold_builds() -> dict[str, Build]:
    from fastdpo.kernels import fold

    fp32 = dict.fromkeys(("m_ptr", "s_ptr", "zy_ptr", "t_ptr", "sq_ptr", "zsum_ptr", "ratio_ptr", "drop_ptr"), "*fp32")
    rows = dict.fromkeys(("m_ptr", "others_ptr", "target_ptr", "entropy_ptr", "offset_ptr"), "*fp32")
    scalars = dict.fromkeys(("scale", "inv_softcap", "cap"), "fp32")
    sizes = {"n_cols": "i32", "stride_z": "i32", "stride_e": "i32"}
    kernels = {}
    for e_type in ("bf16", "fp32"):
        pointers = {"e_ptr": f"*{e_type}", "local_ptr": "*i64", "bias_ptr": "*fp32"}
        for name, on in (("stats", ()), ("write", ("WRITE",)), ("everything", ("BIAS", "CAP", *_STATS, "WRITE"))):
            signature = {"z_ptr": "*fp32", **pointers, **fp32, **sizes, **scalars}
            constants = {"BLOCK": 4096, **_flags(("BIAS", "CAP", *_STATS, "WRITE"), on)}
            kernels[f"fold {e_type} {name}"] = Build(fold._fold_kernel, signature, constants, 8)
        for name, on in (("plain", ()), ("kept", ("KEPT",)), ("everything", ("BIAS", "CAP", "ENTROPY"))):
            signature = {"z_ptr": f"*{e_type}" if name == "kept" else "*fp32", **pointers, **rows, **sizes, **scalars}
            constants = {"BLOCK": 1024, **_flags(("BIAS", "CAP", "ENTROPY", "KEPT"), on)}
            kernels[f"dlogits {e_type} {name}"] = Build(
                fold._dlogits_kernel, {**signature, "slope": "fp32"}, constants, 4
            )
    return kernels


def _logprob_builds() -> dict[str, Build]:
    from fastdpo.kernels import logprob

    kernels = {}
    for x_type in ("bf16", "fp32"):
        signature = {"x_ptr": f"*{x_type}", "label_ptr": "*i64", "m_ptr": "*fp32", "s_ptr": "*fp32", "zy_ptr": "*fp32"}
        signature |= {"V": "i32", "stride_x": "i32", "inv_t": "fp32"}
        kernels[f"logprob_fwd {x_type}"] = Build(logprob._logprob_fwd_kernel, signature, {"BLOCK": 4096}, 8)
        signature = {"x_ptr": f"*{x_type}", "dx_ptr": f"*{x_type}", "label_ptr": "*i64"}
        signature |= dict.fromkeys(("base_ptr", "others_ptr", "target_ptr"), "*fp32")
        signature |= {"V": "i32", "stride_x": "i32", "stride_dx": "i32", "inv_t": "fp32"}
        kernels[f"logprob_bwd {x_type}"] = Build(logprob._logprob_bwd_kernel, signature, {"BLOCK": 4096}, 8)
    return kernels


def _row_builds() -> dict[str, Build]:
    from fastdpo.kernels import fused_offsets, segment_sum

    sums = {f"{name}_part": "*fp32" for name in ("m", "s", "t", "sq", "zsum")}
    rows = {f"{name}_ptr": "*fp32" for name in ("m", "s", "t", "sq", "zsum")}
    sizes = {"n_rows": "i32", "n_blocks": "i32", "stride_p": "i32"}
    offset = {"m_part": "*fp32", "old_ptr": "*fp32", "new_ptr": "*fp32"}
    tile = {"BR": 32, "BB": 32}
    rebase_sizes = {"n_rows": "i32", "n_cols": "i32", "stride_e": "i32", "stride_p": "i32"}
    rescale = {"a_ptr": "*fp32", "ratio_ptr": "*fp32", "n_rows": "i32", "depth": "i32", "stride_a": "i32"}
    segment = {"value_ptr": "*fp32", "offset_ptr": "*i64", "out_ptr": "*fp32"}
    return {
        "merge": Build(fused_offsets._merge_kernel, {**sums, **rows, **sizes}, {**tile, **_flags(_STATS, ())}, 4),
        "merge everything": Build(
            fused_offsets._merge_kernel, {**sums, **rows, **sizes}, {**tile, **_flags(_STATS, _STATS)}, 4
        ),
        "advance": Build(
            fused_offsets._advance_kernel, {**offset, "ratio_ptr": "*fp32", **sizes}, {**tile, "WINDOW": 60.0}, 4
        ),
        "rebase": Build(
            fused_offsets._rebase_kernel,
            {"e_ptr": "*bf16", **offset, **rebase_sizes},
            {"WINDOW": 60.0, "BV": 128, "BR": 32, "BC": 64},
            4,
        ),
        "rescale": Build(fused_offsets._rescale_kernel, rescale, {"BR": 32, "BC": 128}, 4),
        "segment_sum": Build(segment_sum._segment_sum_kernel, segment, {"BLOCK": 1024}, 4),
    }


def _fused_builds(target: str) -> dict[str, Build]:
    from fastdpo.kernels import configs, fused_dlogits, fused_fold

    dlogits = configs.dlogits_config(target)
    options = ("LORA", "BIAS", "CAP")
    kernels = {}
    for x_type, forms in (
        (
            "bf16",
            (
                ("stats", ()),
                ("write", ("WRITE",)),
                ("odd write", ("WRITE",)),
                ("all stats", _STATS),
                ("no softcap", ("LORA", "BIAS", *_STATS, "WRITE")),
                ("everything", (*options, *_STATS, "WRITE")),
            ),
        ),
        ("fp16", (("write", ("WRITE",)),)),
    ):
        for name, on in forms:
            partials = dict.fromkeys(("offset_ptr", "m_ptr", "s_ptr", "t_ptr", "sq_ptr", "zsum_ptr", "zy_ptr"), "*fp32")
            flags = _flags((*options, *_STATS, "WRITE"), on)
            fold = _odd(configs.fold_config(target, softcap=flags["CAP"]), name)
            kernels[f"fused_fold {x_type} {name}"] = _fused_build(
                fused_fold._fused_fold_kernel,
                fold,
                x_type,
                "e",
                partials,
                {"stride_p": "i32"},
                {**flags, "WINDOW": 8.0},
                even=not name.startswith("odd"),
            )
    for name, on in (("plain", ()), ("odd", ()), ("everything", options)):
        rows = dict.fromkeys(("m_ptr", "others_ptr", "target_ptr"), "*fp32")
        kernels[f"fused_dlogits bf16 {name}"] = _fused_build(
            fused_dlogits._fused_dlogits_kernel,
            _odd(dlogits, name),
            "bf16",
            "d",
            rows,
            {"slope": "fp32"},
            _flags(options, on),
            even=name != "odd",
        )
    return kernels


def _odd(config: Any, name: str) -> Any:
    """What runs where rows do not start at multiples of 16 bytes: pointers, for the builds named so."""
    return replace(config, tma=False) if name.startswith("odd") else config


def _fused_build(
    kernel: Any,
    config: Any,
    x_type: str,
    out: str,
    vectors: Mapping[Any, str],
    scalars: dict[str, str],
    flags: Mapping[str, Any],
    even: bool = True,
) -> Build:
    strides = tuple(f"stride_{name}" for name in ("h", "w", "u", "b", out))
    sizes = dict.fromkeys(("n_rows", "n_cols", "depth", "rank", *strides), "i32")
    numbers = dict.fromkeys(("scale", "inv_softcap", "cap"), "fp32")
    rows, cols, k = config.block_rows, config.block_cols, config.block_k
    large = {"h": (rows, k), "w": (cols, k), out: (rows, cols) if flags.get("WRITE", True) else (rows, k)}
    types = {name: f"tensordesc<{x_type}[{a},{b}]>" if config.tma else f"*{x_type}" for name, (a, b) in large.items()}
    types |= {"u_ptr": f"*{x_type}", "b_ptr": f"*{x_type}", "local_ptr": "*i64", "bias_ptr": "*fp32"}
    constants = {"BM": rows, "BV": cols, "BK": k, "BR": 16 if flags["LORA"] else k, "GROUP": config.group}
    constants |= {"TMA": config.tma, "EVEN": even, "BRANCH": config.branch, **flags}
    aligned = ("depth", *strides) if even else ()
    return Build(
        kernel, {**types, **vectors, **sizes, **numbers, **scalars}, constants, config.warps, config.stages, aligned
    )


def _flags(names: tuple[str, ...], on: tuple[str, ...]) -> dict[str, Any]:
    return {name: name in on for name in names}


def resources(target: str, candidates: bool = False) -> list[dict[str, Any]]:
    """One dict for each kernel: registers, spills (bytes; on AMD registers), shared (bytes), and what its text holds.

    `candidates`: of `candidate_builds` instead of `builds`.

    Raises:
        RuntimeError: a kernel does not compile.
    """
    switches = {"TRITON_INTERPRET": "0", "TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "fastdpo.ops.ahead_of_time", target, *["--candidates"] * candidates],
        env={**os.environ, **switches, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(f"a kernel does not compile for {target}: {done.stderr[-2000:]}")
    rows, log = [], ""
    for line in done.stdout.splitlines():
        if not line.startswith("{"):
            log += line + "\n"
            continue
        row = json.loads(line)
        if target.startswith("sm"):
            row["registers"] = int(_read(r"Used (\d+) registers", log))
            row["spills"] = int(_read(r"(\d+) bytes spill stores", log))
            row["serialized"] = "serializ" in log
        rows.append(row)
        log = ""
    return rows


def _read(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the compiler's report does not say {pattern!r}: {text[-500:]}")
    return match[1]


def _compile(build: Build, target: str) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    machine = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    types = {**build.signature, **dict.fromkeys(build.constants, "constexpr")}
    names = build.kernel.arg_names
    aligned = [i for i, name in enumerate(names) if types[name].startswith("*") or name in build.aligned]
    source = ASTSource(
        build.kernel,
        signature={name: types[name] for name in names},
        constexprs=build.constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    built = triton.compile(source, target=machine, options={"num_warps": build.warps, "num_stages": build.stages})
    text = built.asm["ptx"] if "ptx" in built.asm else built.asm["amdgcn"]
    matrix = re.search(r"\b(wgmma|tcgen05|v_mfma|mma\.sync)", text)
    used = {
        "shared": built.metadata.shared,
        "matrix": matrix[1] if matrix else "",
        "async": "TMA" if "cp.async.bulk.tensor" in text else "cp.async" if "cp.async" in text else "",
        "tf32": "tf32" in text,
        "atomics": bool(re.search(r"\batom", text)),
    }
    if "amdgcn" in built.asm:
        used["registers"] = int(_read(r"\.vgpr_count:\s+(\d+)", text))
        used["spills"] = int(_read(r"\.vgpr_spill_count:\s+(\d+)", text))
    return used


def main() -> None:
    target, *options = sys.argv[1:]
    for name, build in (candidate_builds if options else builds)(target).items():
        print(f"== {name}", file=sys.stderr, flush=True)
        print(json.dumps({"kernel": name, "target": target, **_compile(build, target)}), flush=True)


if __name__ == "__main__":
    main()
