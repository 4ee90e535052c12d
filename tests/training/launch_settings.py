"What `accelerate launch` puts into the environment of the processes that it begins, for a configuration of ours."
import os
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2]/'tools'/'accelerate'

def told_by(
    name, # of a configuration in `tools/accelerate`
):
    "Variable -> value"
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
    given = ['--config_file', str(CONFIGS/f'{name}.yaml'), '--num_processes', '2', 'script.py']
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    args.deepspeed_fields_from_accelerate_config = ''
    env = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {k: v for k, v in env.items() if os.environ.get(k) != v}
