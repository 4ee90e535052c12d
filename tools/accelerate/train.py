#!/usr/bin/env python3
"""Train one recipe on the processes that a launcher began, from its newest checkpoint if there is one.

    accelerate launch --config_file tools/accelerate/fsdp2.yaml tools/accelerate/train.py smoe --out runs/smoe
    torchrun --nproc-per-node 2 tools/accelerate/train.py smoe --out runs/smoe        # a copy in each process

A script to begin your own from: with FSDP2 each process keeps a part of every matrix, and all of them write the
checkpoints. The same command goes on from the newest, also with another number of processes or in the other way.
At the end the model lies whole in OUT/model.
"""
import argparse
from pathlib import Path
from libmoe_nb.core.ranks import is_main, joined, wait_for_all
from libmoe_nb.data.text import text_data
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.moe.config import get_preset
from libmoe_nb.training.checkpoints import Checkpoint, consolidate, resume
from libmoe_nb.training.distributed import *
from libmoe_nb.training.learner import moe_learner
from libmoe_nb.training.log import RunLog

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('recipe', nargs='?', default='smoe')
    p.add_argument('--preset', default='mini'); p.add_argument('--data', default='python')
    p.add_argument('--out', type=Path, default=Path('trained')); p.add_argument('--steps', type=int)
    p.add_argument('--every', type=int, default=100, help='steps between two checkpoints')
    p.add_argument('--max-bytes', type=int, default=4_000_000); p.add_argument('--device', default='cuda')
    a = p.parse_args()
    with joined(a.device): train(a, get_preset(a.preset))

def train(a, preset):
    data = text_data(a.data, vocab_size=preset.vocab_size, sequence_length=preset.sequence_length,
                     max_bytes=a.max_bytes)
    model = from_scratch(a.recipe, preset, seed=0, vocab_size=data.vocab_size)
    learn = moe_learner(model, data, preset=preset, steps=a.steps, device=a.device, valid_steps=4,
                        bf16=a.device == 'cuda', cbs=[Checkpoint(a.out/'checkpoints', every=a.every),
                                                      RunLog(a.out/'log.jsonl')])
    learn.distribute(cpu=a.device == 'cpu')
    resume(learn, a.out/'checkpoints')
    with learn.no_bar(): learn.fit_cosine()
    if is_main() and not (a.out/'model').exists(): print('model:', consolidate(a.out/'checkpoints', a.out/'model'))
    wait_for_all()

if __name__ == '__main__': main()
