#!/usr/bin/env python3
"""Train one recipe with the Trainer of transformers, which is what DeepSpeed needs.

    accelerate launch --config_file tools/accelerate/zero3.yaml tools/accelerate/trainer.py smoe --out runs/smoe

Without a launcher it trains on one device. The losses of the routers are in the model's own loss, and `RouterCallback`
moves expert biases. `benchmarks/zero.py` runs it with DeepSpeed on two CPU processes.
"""
import argparse, os
from pathlib import Path
from transformers import Trainer, TrainingArguments
from libmoe_nb.data.text import text_data
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.moe.config import get_preset
from libmoe_nb.training.trainer_callback import RouterCallback

class Blocks:
    "Blocks of a `PackedDataset` as the Trainer takes them: labels are shifted by the model"
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data)
    def __getitem__(self, i):
        ids = self.data[i]['input_ids']
        return dict(input_ids=ids, labels=ids.clone())

def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('recipe', nargs='?', default='smoe')
    p.add_argument('--preset', default='mini'); p.add_argument('--data', default='python')
    p.add_argument('--out', type=Path, default=Path('trained')); p.add_argument('--steps', type=int)
    p.add_argument('--max-bytes', type=int, default=4_000_000)
    p.add_argument('--device', default=None, help='cpu, or what there is')
    a = p.parse_args(args)
    preset = get_preset(a.preset)
    data = text_data(a.data, vocab_size=preset.vocab_size, sequence_length=preset.sequence_length,
                     max_bytes=a.max_bytes)
    # before the arguments: with them transformers knows of ZeRO-3, and would cut matrices while they are made
    model = from_scratch(a.recipe, preset, seed=0, vocab_size=data.vocab_size)
    how = TrainingArguments(str(a.out), per_device_train_batch_size=preset.batch_size,
                            max_steps=a.steps or preset.steps, learning_rate=preset.learning_rate,
                            weight_decay=preset.weight_decay, warmup_steps=preset.warmup_steps, logging_steps=1,
                            lr_scheduler_type='cosine', save_strategy='no', report_to='none', disable_tqdm=True,
                            use_cpu=a.device == 'cpu', bf16=os.environ.get('ACCELERATE_MIXED_PRECISION') == 'bf16')
    callbacks = [RouterCallback()] * (a.recipe != 'dense')
    trainer = Trainer(model, how, train_dataset=Blocks(data.train), callbacks=callbacks)
    done = trainer.train()
    trainer.save_model(a.out/'model')
    trainer.accelerator.end_training()                               # the processes part before they end
    return done.training_loss

if __name__ == '__main__': print('loss:', main())
