"The template for SLURM, with stand-ins for SLURM's commands: what it starts, and what it does when the time is over."
import os, signal, subprocess, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUBS = dict(srun='exec "$@"', scontrol='[ "$1" = show ] && echo node7 || echo "scontrol $*" >> "$SAID"',
             torchrun='echo "torchrun $*" >> "$SAID"\ntrap \'echo stopped >> "$SAID"; exit 1\' TERM\n'
                      'if [ -n "$QUICK" ]; then exit "$QUICK"; fi\nfor i in $(seq 300); do sleep .1; done')

def begin(folder, quick=''):
    for name, text in STUBS.items():
        (folder/name).write_text(f'#!/bin/bash\n{text}\n'); (folder/name).chmod(0o755)
    env = dict(os.environ, PATH=f'{folder}:{os.environ["PATH"]}', SAID=str(folder/'said'), QUICK=quick, SLURM_JOB_ID='7',
               SLURM_JOB_NODELIST='node[7-8]', SLURM_NNODES='2', SLURM_GPUS_ON_NODE='4')
    return subprocess.Popen(['bash', ROOT/'tools/libmoe.sbatch', 'train', 'smoe', '--out', 'runs/a b'], env=env)

def said(folder):
    try: return (folder/'said').read_text().splitlines()
    except OSError: return []

def test_the_run_saves_and_goes_back_into_the_queue(tmp_path):
    process, end = begin(tmp_path), time.monotonic() + 20
    while not said(tmp_path) and time.monotonic() < end: time.sleep(.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    first, *rest = said(tmp_path)
    assert rest == ['stopped', 'scontrol requeue 7']
    assert '--nnodes 2 --nproc-per-node 4' in first and '--rdzv-endpoint node7:29500' in first
    assert first.endswith('--no-python libmoe train smoe --out runs/a b')

def test_a_run_that_ends_is_not_begun_again(tmp_path):
    assert begin(tmp_path, quick='3').wait(20) == 3
    assert begin(tmp_path, quick='0').wait(20) == 0
    assert len(said(tmp_path)) == 2 and not any('requeue' in l for l in said(tmp_path))
