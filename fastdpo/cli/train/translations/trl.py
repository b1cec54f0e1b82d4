"""A YAML of `trl dpo` as arguments of `fastdpo train`: its fields are ours, beside these of its command line."""

from fastdpo.cli.train.translations.tool import Arguments, Tool

_LAUNCH = "accelerate_config machine_rank main_process_ip main_process_port num_machines num_processes"
REFUSED = {
    "env": "set these variables in the shell",
    **dict.fromkeys(_LAUNCH.split(), "start it with accelerate launch ... -m fastdpo train"),
}
NO_EFFECT = {"a distributed run does not need it": "ignore_bias_buffers"}


def _is_one(arguments: Arguments) -> bool:
    return bool(arguments.keys() & {*REFUSED, *TRL.why_not})


TRL = Tool(
    name="TRL",
    mark="num_processes",
    is_one=_is_one,
    renamed={"torch_dtype": "dtype", "streaming": "dataset_streaming"},
    refused=REFUSED,
    no_effect=NO_EFFECT,
    by_code={},
)
